"""The two towers of CLIP and the named architectures."""
