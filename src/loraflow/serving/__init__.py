"""Serving fusions: an engine for many requests at once, and an OpenAI-compatible server before it."""
