"""Make and index shards."""
