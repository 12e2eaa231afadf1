"""The idx files of MNIST and its successors."""

from __future__ import annotations

import gzip
import pathlib
import re

import numpy as np

from kwjax.errors import DataError
from kwjax.runtime.data.readers import UNREADABLE, ArrayReader, Reader, checked_pixels

# MNIST and its drop-in replacements call the test split t10k, EMNIST test; some unpacked files have a dot.
_IMAGES = re.compile(r"(.*?)(t10k|test|train|[^-]*)-images[-.]idx3-ubyte(\.gz)?")
_SPLITS = {"test": ("t10k", "test"), "train": ("train",)}
FORM = "PREFIXt10k- or PREFIXtrain-images-idx3-ubyte.gz"


def find_idx(path: pathlib.Path) -> list[pathlib.Path]:
  """The image files of `path`: a folder, one of its files, or a folder and a file name prefix."""
  if path.is_file():
    return [path] if _IMAGES.fullmatch(path.name) else []
  folder, prefix = (path, "") if path.is_dir() else (path.parent, path.name)
  if not folder.is_dir():
    return []
  return sorted(p for p in folder.iterdir() if p.name.startswith(prefix) and _IMAGES.fullmatch(p.name))


def open_idx(path: pathlib.Path, found: list[pathlib.Path], split: str | None) -> tuple[Reader, np.ndarray | None]:
  """Open the images of one split, and the labels if their file exists; grey images can be read as RGB.

  Args:
    path: as the user gave it, for errors.
    found: its image files.
    split: test, train, or the file name before `-images`; None prefers test to train.

  Raises:
    DataError: the split has no file or several, or a file is damaged.
  """
  for name in [split] if split else list(_SPLITS):
    chosen = [p for p in found if _split_name(p) in _SPLITS.get(name, (name,))]
    # The compressed original is preferred to an unpacked file beside it.
    by_stem = {
      p.name.removesuffix(".gz").replace(".idx", "-idx"): p
      for p in sorted(chosen, key=lambda p: p.suffix != ".gz", reverse=True)
    }
    if len(by_stem) > 1:
      raise DataError(f"{path} has several {name} images, {' and '.join(sorted(by_stem))}: name one of the files")
    if by_stem:
      return _open_pair(next(iter(by_stem.values())))
  if split is None and len(found) == 1:
    return _open_pair(found[0])
  wanted = split or " or ".join(_SPLITS)
  raise DataError(f"{path} has no {wanted} images: expected {FORM}, found {[p.name for p in found]}")


def _split_name(path: pathlib.Path) -> str:
  match = _IMAGES.fullmatch(path.name)
  return match[2] if match else ""


def _open_pair(path: pathlib.Path) -> tuple[Reader, np.ndarray | None]:
  images = read_idx(path)
  if images.ndim != 3:
    raise DataError(f"{path}: expected images [n,h,w], found an idx file of {images.ndim} axes")
  labels_path = path.with_name(re.sub(r"images([-.])idx3", r"labels\1idx1", path.name))
  labels = read_idx(labels_path) if labels_path.exists() else None
  return ArrayReader(checked_pixels(images[..., None], path.name), path.name, grey_to_rgb=True), labels


def read_idx(path: pathlib.Path) -> np.ndarray:
  """An idx file, gzipped or not: 0, 0, type 8 (uint8), number of axes, each axis as big-endian u32, then the bytes.

  Raises:
    DataError: it is not an idx file, or is damaged.
  """
  try:
    data = path.read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    if data[:3] != b"\0\0\x08" or len(data) != 4 + 4 * data[3] + int(np.prod(shape, dtype=np.int64)):
      raise ValueError("not an idx file of bytes, or cut off")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
  except (*UNREADABLE, IndexError) as error:
    raise DataError(f"cannot read {path}: {error}") from error
