"""Distillation and calibration from noise and dead leaves: Raikwar & Mishra (2022)."""
