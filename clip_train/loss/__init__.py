"""Contrastive losses over all ranks, without a quadratic matrix."""
