"""Noise paths, training times and loss weights."""
