"""Floor 1: shared memory and the atomics that make it usable."""
