"""What methods share among themselves."""
