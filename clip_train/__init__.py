"""clip-train: contrastive image-text training.

The public API is small and loads lazily: importing this package imports neither torch nor anything heavy.
"""

__version__ = "0.1.0"
