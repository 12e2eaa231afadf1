"""Reports, curves and messages for people."""
