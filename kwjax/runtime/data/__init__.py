"""Image sets: arrays, folders, archives, idx files and TensorFlow Datasets."""

from kwjax.runtime.data.images import ImageData, load_data

__all__ = ["ImageData", "load_data"]
