"""What small models of each mixer learn on tasks that separate the families; see `benchmarks.quality.__main__`."""
