"""Image sets: arrays, folders, archives, idx files and TensorFlow Datasets."""
