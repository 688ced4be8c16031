"""What `shards make` reads: one module per kind of input, each of which lists pairs without opening a picture."""
