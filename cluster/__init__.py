"""Correspondence: descriptors in, labels out. Knows nothing of images or networks."""
