"""Optimizer, learning rate and averaged weights."""
