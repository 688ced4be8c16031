"""A trained model for other libraries: files they read, refusals where they would compute something else, and proof."""
