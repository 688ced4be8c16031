"""Where samples come from: index, slot order, reading, decoding, delivery, and the shard writers."""
