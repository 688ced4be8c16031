"""Commands on top of the public API: classify pictures, write a run's report."""
