"""Known pitfalls of CLIP models, measured on generated pictures."""
