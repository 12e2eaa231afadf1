"""Comparisons of calibration methods, beyond the papers."""
