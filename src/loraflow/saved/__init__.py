"""A fusion on disk."""
