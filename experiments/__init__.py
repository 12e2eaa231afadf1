"""Runnable documents: each reproduces one result with one command."""
