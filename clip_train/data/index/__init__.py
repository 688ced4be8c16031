"""What lies where in a shard, found once by its headers."""
