"""Remote shards as local files: counted, planned, fetched, kept within a bound."""
