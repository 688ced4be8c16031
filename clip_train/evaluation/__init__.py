"""Evaluators: zero-shot classification and retrieval on all ranks, their results and report samples."""
