"""Tell pictures of known classes from foreign ones."""
