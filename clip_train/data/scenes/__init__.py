"""Compositional pictures with captions, drawn from scratch, with combinations that training never sees."""
