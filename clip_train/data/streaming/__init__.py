"""The streaming reader, for what cannot be indexed."""
