"""Comparisons with transformers and timm: the same weights, the same images, differences and times."""
