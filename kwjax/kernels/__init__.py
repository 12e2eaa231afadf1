"""Fast forms of layers for CPUs."""
