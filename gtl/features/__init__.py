"""Frozen features: heads that say what is in pictures, and pictures that are found by others."""
