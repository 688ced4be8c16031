"""Differences between groups of images: accuracy, labels, order of retrieval."""
