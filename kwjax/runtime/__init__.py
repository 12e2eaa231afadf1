"""Devices, checkpoints, data sets, evaluation and reports; nothing here knows the stages."""
