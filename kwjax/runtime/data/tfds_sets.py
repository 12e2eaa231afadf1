"""Data sets prepared by tensorflow-datasets, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from kwjax.errors import DataError
from kwjax.runtime.data.readers import Reader, Shape, decode, fit
from kwjax.runtime.data.tfds import tfds
from kwjax.runtime.data.tfds_writer import is_data_set

PREPARABLE = ("cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist", "svhn_cropped", "stl10", "imagenet2012")
"""Names of the sets that `python -m experiments.prepare_data` makes."""
_ORDER = ("test", "validation", "train")


@dataclasses.dataclass(frozen=True)
class TfdsReader:
  """Examples with an `image`, by index; grey images are repeated if three channels are wanted.

  Attributes:
    name: for errors.
    examples: of tensorflow-datasets.
    count: their number.
    channels: of encoded images; None for arrays.
    photographs: see `fit`.
  """

  name: str
  examples: Sequence[Any] = dataclasses.field(repr=False)
  count: int
  channels: int | None = None
  photographs: bool = False

  def native_shape(self) -> Shape:
    """Shape of the first image."""
    height, width, channels = self._pixels(0).shape
    return height, width, channels

  def read(self, index: int, shape: Shape) -> np.ndarray:
    """Image `index` as f32[shape] in [0, 1].

    Raises:
      DataError: the record cannot be read, or holds no image of that many channels with pixels in the range.
    """
    where = f"tfds:{self.name}, image {index}"
    return fit(self._pixels(index), shape, where, grey_to_rgb=True, photographs=self.photographs)

  def _pixels(self, index: int) -> np.ndarray:
    where = f"tfds:{self.name}, image {index}"
    try:
      image = self.examples[index]["image"]
      pixels = np.asarray(image) if self.channels is None else decode(image, self.channels)
    # array_record, protobuf and the image decoder share no error class.
    except Exception as error:
      raise _unreadable(self.name, f"image {index}", error) from error
    if pixels.ndim != 3 or pixels.dtype not in (np.uint8, np.float32):
      raise DataError(f"{where}: expected uint8 or float32[h,w,c], found {pixels.dtype}{list(pixels.shape)}")
    # NaN fails every comparison, so the test states what must hold.
    if pixels.dtype == np.float32 and not (pixels.min() >= 0 and pixels.max() <= 1):
      raise DataError(f"{where}: float pixels must be in [0, 1], found {pixels.min():g}..{pixels.max():g}")
    return pixels


def open_tfds(name: str, split: str | None, limit: int | None) -> tuple[Reader, np.ndarray | None]:
  """Open a prepared data set.

  Args:
    name: as tensorflow-datasets writes it, `NAME[/CONFIG][:VERSION]`, in the folder `TFDS_DATA_DIR` or
      `~/tensorflow_datasets`; or the folder of a data set.
    split: a split or a slice of one, such as `train[:10%]`; None: the first of test, validation, train and the others
      that has labels.
    limit: read only that many labels.

  Returns:
    The source and the labels i64[n], None if the split has none.

  Raises:
    DataError: the data set is unknown, is not prepared (the message has the command that prepares it), lacks the split,
      or its examples have no image.
  """
  builder = _builder(name)
  if "image" not in (builder.info.features or {}):
    raise DataError(f"tfds:{name} has no feature `image`, only {sorted(builder.info.features or {})}")
  splits = list(builder.info.splits)
  ordered = [s for s in _ORDER if s in splits] + [s for s in splits if s not in _ORDER]
  opened = (_open_split(builder, name, s, limit) for s in ([split] if split else ordered or ["test"]))
  first = next(opened)
  return first if first[1] is not None else next((found for found in opened if found[1] is not None), first)


def _builder(name: str) -> Any:
  folder = pathlib.Path(name).expanduser()
  if is_data_set(folder):
    try:
      return tfds.builder_from_directory(folder)
    # A damaged description fails in JSON, in protobuf or in the constructor of a feature.
    except Exception as error:
      raise DataError(f"tfds:{name}: its description is damaged: {type(error).__name__}: {error}") from error
  if name.startswith(("/", ".", "~")) or folder.is_dir():
    raise DataError(
      f"tfds:{name} is no data set: the folder has no dataset_info.json (of one in DATA_DIR/NAME/VERSION)"
    )
  try:
    return tfds.builder(name)
  except ValueError as error:
    raise DataError(f"tensorflow-datasets knows no data set {name}: {str(error).splitlines()[0]}") from error


def _open_split(builder: Any, name: str, split: str, limit: int | None) -> tuple[Reader, np.ndarray | None]:
  features = builder.info.features
  image = features["image"]
  is_image = isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8 and image.shape[-1] in (1, 3)
  # In tensorflow-datasets, the pixels of a JPEG depend on whether OpenCV is installed.
  channels = image.shape[-1] if is_image else None
  skip = {"image": tfds.decode.SkipDecoding()}
  try:
    # Without files there is no format, and the error would name that instead.
    if not builder.info.splits:
      raise FileNotFoundError(str(builder.data_dir))
    examples = builder.as_data_source(split, decoders=skip if channels else None)
    count = len(examples) if limit is None else min(limit, len(examples))
  except ValueError as error:
    raise DataError(f"tfds:{name} has no split {split}: {str(error).splitlines()[0]}") from error
  except (NotImplementedError, KeyError, OSError, AssertionError) as error:
    raise DataError(_how_to_prepare(name, builder)) from error
  source = TfdsReader(name, examples, count, channels, None in image.shape)
  if "label" not in features or not count:
    return source, None
  # Labels are read without decoding the images, which would double the time of a run over a large set.
  undecoded = builder.as_data_source(split, decoders=skip)
  labels = np.concatenate([_labels(name, undecoded, range(count)[i : i + 256]) for i in range(0, count, 256)])
  # Some sets publish a test split without its labels, marked -1.
  return source, labels if (labels >= 0).any() else None


def _labels(name: str, examples: Any, indices: range) -> np.ndarray:
  try:
    # Several records at a time are read twice as fast.
    return np.array([int(example["label"]) for example in examples.__getitems__(list(indices))], np.int64)
  # As in reading an image.
  except Exception as error:
    raise _unreadable(name, f"images {indices[0]} to {indices[-1]}", error) from error


def _unreadable(name: str, which: str, error: Exception) -> DataError:
  return DataError(f"tfds:{name}, {which}: cannot read the record: {type(error).__name__}: {error}")


def _how_to_prepare(name: str, builder: Any) -> str:
  missing = f"tfds:{name} is not prepared in array_record form in {builder.data_dir}"
  base = re.split("[/:]", name)[0]
  if base in PREPARABLE:
    return f"{missing}; run once, with the downloaded original files: python -m experiments.prepare_data {base} --source FOLDER"
  return (
    f"{missing}; run once (this, unlike reading, may need TensorFlow): "
    f'python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder('{name}', file_format='array_record').download_and_prepare()\""
  )
