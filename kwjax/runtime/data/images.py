"""Real images for evaluation: one function opens every supported form. Images are decoded when read."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from kwjax.errors import DataError
from kwjax.runtime.data import idx, readers
from kwjax.runtime.data.readers import Reader, describe_shape
from kwjax.runtime.files import sha256_file

Batch = tuple[np.ndarray, np.ndarray | None, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ImageData:
  """A data set of images of one shape. Invariant: reading gives f32[n, *image_shape], finite, in [0, 1].

  Attributes:
    name: the name in reports.
    labels: i32[len], or None if the images have no classes.
    image_shape: (height, width, channels).
    source: reads the pixels.
  """

  name: str
  labels: np.ndarray | None
  image_shape: tuple[int, int, int]
  source: Reader = dataclasses.field(repr=False)

  def __len__(self) -> int:
    """Number of images."""
    return self.source.count

  def read(self, indices: np.ndarray | list[int]) -> np.ndarray:
    """Decode the images at `indices` (i[n], each in [0, len)) into f32[n,h,w,c] in [0, 1].

    Raises:
      DataError: an image cannot be decoded or does not have the shape of the set (named), or an index is out of range.
    """
    wanted = np.asarray(indices, np.int64).reshape(-1)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
      raise DataError(f"{self.name} has {len(self)} images, asked for index {wanted.min()}..{wanted.max()}")
    images = np.empty((len(wanted), *self.image_shape), np.float32)
    for row, index in enumerate(wanted):
      images[row] = self.source.read(int(index), self.image_shape)
    return images

  def batches(self, batch_size: int, *, start: int = 0, pad: bool = False) -> Iterator[Batch]:
    """Yields the images in order.

    Args:
      batch_size: images in a batch; the last batch can hold fewer.
      start: index of the first image.
      pad: pad the last batch to `batch_size` with black images of label 0, so that all batches have one shape.

    Yields:
      (images f32[b,h,w,c], labels i32[b] or None, valid bool[b]); `valid` is False for padding.

    Raises:
      DataError: as in `read`; or `batch_size` is below 1 or `start` is outside the set.
    """
    if batch_size < 1 or not 0 <= start <= len(self):
      raise DataError(f"expected batch_size >= 1 and 0 <= start <= {len(self)}, got {batch_size} and {start}")
    for first in range(start, len(self), batch_size):
      chosen = np.arange(first, min(first + batch_size, len(self)))
      labels = None if self.labels is None else self.labels[chosen]
      yield pad_batch(self.read(chosen), labels, batch_size if pad else len(chosen))

  def all(self) -> tuple[np.ndarray, np.ndarray | None]:
    """All images f32[len,h,w,c] and labels at once; 224x224 images take 0.6 MB each."""
    return self.read(np.arange(len(self))), self.labels


def pad_batch(images: np.ndarray, labels: np.ndarray | None, size: int) -> Batch:
  """Pad a batch with zeros to `size` images, and tell which entries are real.

  Args:
    images: f32[b,h,w,c], b <= size.
    labels: i32[b] or None.
    size: number of entries of the result.

  Returns:
    (images f32[size,h,w,c], labels i32[size] or None, valid bool[size]).
  """
  valid = np.arange(size) < len(images)
  missing = size - len(images)
  if missing:
    images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
    labels = None if labels is None else np.concatenate([labels, np.zeros(missing, labels.dtype)])
  return images, labels, valid


def array_data(
  images: np.ndarray, labels: np.ndarray | None = None, *, name: str = "images", num_classes: int | None = None
) -> ImageData:
  """A data set of images in memory.

  Args:
    images: [n,h,w,c]; integers in [0, 255] or floats in [0, 1].
    labels: integers [n] or [n,1], or None.
    name: of the set.
    num_classes: labels must be below it.

  Raises:
    DataError: the arrays have another form.
  """
  source = readers.ArrayReader(readers.checked_pixels(np.asarray(images), name), name)
  return ImageData(name, checked_labels(labels, source.count, num_classes, name), source.native_shape(), source)


def load_data(
  spec: str,
  *,
  image_shape: tuple[int, int, int] | None = None,
  num_classes: int | None = None,
  split: str | None = None,
  limit: int | None = None,
) -> ImageData:
  """Open a data set of images.

  Forms of `spec`; `:SPLIT` can follow a set that has splits (default: test, else validation, else any other):
    `FILE.npz`: `test_images`/`test_labels`, `x_test`/`y_test` (train, val likewise), or `images`/`labels`.
    `FOLDER` or `FILE.zip` of images: named `CLASS_...` with CLASS an integer; or one folder for each class (sorted
      folders are 0, 1, ..., and what lies deeper is of its class; a part of the ImageNet folders `nXXXXXXXX` keeps its
      indices among the 1000 classes); or without classes.
    `FOLDER` or `FOLDER/PREFIX` of idx files, gzipped or not: `PREFIXt10k-images-idx3-ubyte.gz` and its siblings (MNIST,
      Fashion-MNIST, KMNIST, EMNIST), or one such file.
    `tfds:NAME` or `tfds:NAME/CONFIG:VERSION`: a prepared TensorFlow data set in array_record or parquet form, in
      `TFDS_DATA_DIR` or `~/tensorflow_datasets`; TensorFlow is not needed.
    `tfds:FOLDER`: the same by its folder (the one with `dataset_info.json`), as `kwjax.save_tfds` writes.

  Images of another size are resized, antialiased and bilinear:

  - Photographs, which are image files and tfds sets with images of several sizes: the shorter side becomes 256/224 of the
    wanted one, and the centre is cropped. This is the usual ImageNet evaluation.
  - Sets of images of one size (arrays, idx, other tfds sets): the shorter side becomes the wanted one. Smaller images are
    refused. 28x28 images for 32x32 get a black border of two pixels instead, which keeps the strokes.
  - Grey images of idx and tfds sets become RGB by repetition if three channels are wanted.

  Args:
    spec: see above.
    image_shape: (height, width, channels) wanted; None keeps the shape of the first image.
    num_classes: labels must be in [0, num_classes).
    split: the split, instead of `:SPLIT`.
    limit: use the first `limit` images, in the order of the file or of the sorted names.

  Returns:
    `ImageData`; images in folders, zips and tfds sets are decoded each time they are read.

  Raises:
    DataError: the data is missing (for a tfds set, with the command that prepares it), the form or split is unknown,
      there are no images, or channels, size, pixels or labels are out of range. Image files are checked when read; the
      message names the file.
  """
  path, split = _split_of(spec, split)
  if limit is not None and limit < 1:
    raise DataError(f"limit must be at least 1, got {limit}")
  if path.startswith("tfds:"):
    from kwjax.runtime.data import tfds_sets

    source, labels = tfds_sets.open_tfds(path.removeprefix("tfds:"), split, limit)
  else:
    place = pathlib.Path(path).expanduser()
    if found := idx.find_idx(place):
      source, labels = idx.open_idx(place, found, split)
    else:
      source, labels = readers.open_path(place, split, num_classes)
  if not source.count:
    raise DataError(f"{spec} holds no images")
  if limit is not None and limit < source.count:
    source = dataclasses.replace(source, count=limit)  # type: ignore[type-var]
    labels = None if labels is None else labels[:limit]
  shape = source.native_shape() if image_shape is None else image_shape
  data = ImageData(spec, checked_labels(labels, source.count, num_classes, spec), shape, source)
  # One image shows a wrong number of channels now rather than in the middle of a run.
  data.read([0])
  return data


def content_digest(spec: str) -> str | None:
  """What tells the content of a data set from another's: the bytes of a file, the names and sizes of the files in a folder.

  Args:
    spec: as of `load_data`.

  Returns:
    16 hexadecimal digits; None for a TensorFlow data set by its name, which has a version, and for what does not exist.
  """
  place = pathlib.Path(_split_of(spec, None)[0].removeprefix("tfds:")).expanduser()
  if place.is_file():
    return sha256_file(place)[:16]
  files = place.rglob("*") if place.is_dir() else place.parent.glob(f"{glob.escape(place.name)}*-ubyte*")
  found = [(path.relative_to(place.parent).as_posix(), path.stat().st_size) for path in files if path.is_file()]
  return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()[:16] if found else None


def checked_labels(labels: np.ndarray | None, count: int, num_classes: int | None, name: str) -> np.ndarray | None:
  """Labels as i32[count], or None.

  Raises:
    DataError: they are not `count` integers in [0, num_classes).
  """
  if labels is None:
    return None
  labels = np.asarray(labels)
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  if labels.shape != (count,) or labels.dtype.kind not in "iu":
    raise DataError(f"{name}: expected {count} integer labels, found {labels.dtype}{describe_shape(labels.shape)}")
  low, high = int(labels.min()), int(labels.max())
  if low < 0 or (num_classes is not None and high >= num_classes):
    upper = "" if num_classes is None else f" and below {num_classes}"
    raise DataError(f"{name}: labels must be at least 0{upper}, found {low}..{high}")
  return labels.astype(np.int32)


def _split_of(spec: str, split: str | None) -> tuple[str, str | None]:
  """Split off `:SPLIT`. The `:1.2.3` of a tfds name is a version, and an existing path can contain a colon."""
  prefix = "tfds:" if spec.startswith("tfds:") else ""
  rest = spec.removeprefix(prefix)
  # A tfds split can contain a colon, as in `train[:10%]`.
  match = re.fullmatch(r"(.+):([^:\[\]]+(?:\[[^\]]*\])?)", rest)
  if match is None:
    return spec, split
  head, tail = match.groups()
  is_path = pathlib.Path(rest).expanduser().exists() or "/" in tail or "\\" in tail
  if is_path or (prefix and re.fullmatch(r"\d+\.\d+\.\d+|\*", tail)):
    return spec, split
  if split is not None and split != tail:
    raise DataError(f"{spec} names the split {tail}, but the split {split} is asked for")
  return prefix + head, tail
