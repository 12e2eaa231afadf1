"""Data sets prepared by tensorflow-datasets, read without TensorFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from kwjax.errors import DataError
from kwjax.runtime.data_sources import Shape, Source, fit

_ORDER = ("test", "validation", "train")


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """Examples with an `image`, by number; grey images are repeated where three channels are wanted."""

  name: str
  examples: Sequence[Any] = dataclasses.field(repr=False)
  count: int

  def native_shape(self) -> Shape:
    """Shape of the first image."""
    height, width, channels = np.shape(self.examples[0]["image"])
    return height, width, channels

  def read(self, index: int, shape: Shape) -> np.ndarray:
    """Image `index` as f32[shape] in [0, 1].

    Raises:
      DataError: the record cannot be read, or holds no uint8 image of that many channels.
    """
    where = f"tfds:{self.name}, image {index}"
    try:
      pixels = np.asarray(self.examples[index]["image"])
    # array_record, protobuf and the image decoder have no error in common.
    except Exception as error:
      raise DataError(f"{where}: cannot read the record: {type(error).__name__}: {error}") from error
    if pixels.ndim != 3 or pixels.dtype != np.uint8:
      raise DataError(f"{where}: expected uint8[h,w,c], found {pixels.dtype}{list(pixels.shape)}")
    return fit(pixels, shape, where, grey_to_rgb=True)


def open_tfds(name: str, split: str | None, limit: int | None) -> tuple[Source, np.ndarray | None]:
  """Opens a prepared data set.

  Args:
    name: as tensorflow-datasets writes it, `NAME[/CONFIG][:VERSION]`; the folder is `TFDS_DATA_DIR` or
      `~/tensorflow_datasets`.
    split: a split or a slice of one, such as `train[:10%]`; None takes the first of test, validation and train that
      has labels.
    limit: labels are read for that many images only.

  Returns:
    The source and the labels i64[n], None if the split has none.

  Raises:
    DataError: the data set is unknown, is not prepared (with the command that does it), lacks the split, or its
      examples have no image.
  """
  try:
    builder = tfds.builder(name)
  except ValueError as error:
    raise DataError(f"tensorflow-datasets knows no data set {name}: {str(error).splitlines()[0]}") from error
  if "image" not in (builder.info.features or {}):
    raise DataError(f"tfds:{name} has no feature `image`, only {sorted(builder.info.features or {})}")
  candidates = [split] if split else [s for s in _ORDER if s in builder.info.splits] or ["test"]
  opened = (_open_split(name, candidate, limit) for candidate in candidates)
  first = next(opened)
  return first if first[1] is not None else next((found for found in opened if found[1] is not None), first)


def _open_split(name: str, split: str, limit: int | None) -> tuple[Source, np.ndarray | None]:
  try:
    examples = tfds.data_source(name, split=split, download=False)
    count = len(examples) if limit is None else min(limit, len(examples))
  except ValueError as error:
    raise DataError(f"tfds:{name} has no split {split}: {str(error).splitlines()[0]}") from error
  except (NotImplementedError, KeyError, OSError, AssertionError) as error:
    raise DataError(
      f"tfds:{name} is not prepared in array_record form; run once (this, unlike reading, may need TensorFlow): "
      f'python -c "import tensorflow_datasets as tfds; '
      f"tfds.builder('{name}', file_format='array_record').download_and_prepare()\""
    ) from error
  if "label" not in examples.dataset_info.features:
    return TfdsSource(name, examples, count), None
  # Decoding the images to learn the labels would double the time of a run over a large set.
  undecoded = tfds.data_source(name, split=split, download=False, decoders={"image": tfds.decode.SkipDecoding()})
  labels = np.array([int(undecoded[i]["label"]) for i in range(count)], np.int64)
  # Some sets publish a test split without its labels, marked -1.
  return TfdsSource(name, examples, count), labels if (labels >= 0).any() else None
