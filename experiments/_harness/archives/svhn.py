"""Street View House Numbers of Netzer et al. (2011), format 2: digits cropped to 32x32, in MATLAB files."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments._harness.archives.recipe import Opened, Recipe, Records, Source, checked_labels, png
from kwjax.errors import DataError


def _open(source: Source, splits: Sequence[str]) -> Opened:
  return Opened({split: _records(source.file(f"{split}_32x32.mat"), split) for split in splits}, {})


def _load(path: pathlib.Path) -> dict[str, Any]:
  try:
    import scipy.io
  except ImportError as error:
    raise DataError(f"{path}: reading MATLAB files needs SciPy: pip install scipy") from error
  try:
    return scipy.io.loadmat(path, variable_names=("X", "y"))
  # SciPy's reader meets a damaged file with errors of many kinds.
  except Exception as error:
    raise DataError(f"{path} is cut off or damaged: {type(error).__name__}: {error}") from error


def _records(path: pathlib.Path, split: str) -> Records:
  arrays = _load(path)
  images = arrays.get("X")
  if (
    not isinstance(images, np.ndarray)
    or images.dtype != np.uint8
    or images.ndim != 4
    or images.shape[:3] != (32, 32, 3)
  ):
    raise DataError(f"{path}: expected a variable X, uint8[32,32,3,n], found {getattr(images, 'shape', None)}")
  digits = np.asarray(arrays.get("y", ()))
  # The files number the digits 1 to 10, where 10 is the digit 0.
  if digits.size and digits.min() < 1:
    raise DataError(f"{path}: labels must be in 1..10, found {digits.min()}")
  labels = checked_labels(np.where(digits == 10, 0, digits), images.shape[3], 10, str(path))

  def example(index: int) -> dict[str, Any]:
    image = np.ascontiguousarray(images[..., index])
    return {"id": f"{split}_{index:05d}", "image": png(image), "label": int(labels[index])}

  return Records(range(images.shape[3]), example)


RECIPE = Recipe(
  name="svhn_cropped",
  files="train_32x32.mat, test_32x32.mat (and extra_32x32.mat for the split extra)",
  homepage="http://ufldl.stanford.edu/housenumbers/",
  counts={"train": 73257, "test": 26032, "extra": 531131},
  default=("train", "test"),
  open=_open,
)
