"""Let clip-benchmark, in a Python of its own, confirm our numbers on generated sets."""
