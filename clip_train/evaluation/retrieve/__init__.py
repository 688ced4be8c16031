"""Retrieval both ways on images with captions."""
