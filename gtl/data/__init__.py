"""Training images: sources, crops, the cache of what encoders make of them, the batch plan, the loader."""
