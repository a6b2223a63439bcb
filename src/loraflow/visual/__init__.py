"""Fusion weights as pictures: in the terminal and in notebooks."""
