"""Devices and processes: batches spread over them, arrays placed on them, results brought back."""
