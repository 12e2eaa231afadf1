"""STL-10 of Coates et al. (2011), binary version: planes of 96x96, column by column."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from experiments._harness.archives.recipe import Opened, Recipe, Records, Source, checked_labels, png, unpack
from kwjax.errors import DataError

_FOLDER = "stl10_binary"
_FILES = {
  "train": ("train_X.bin", "train_y.bin"),
  "test": ("test_X.bin", "test_y.bin"),
  "unlabelled": ("unlabeled_X.bin",),
}
_IMAGE_BYTES = 3 * 96 * 96


def _open(source: Source, splits: Sequence[str]) -> Opened:
  path = source.file(f"{_FOLDER}.tar.gz", _FOLDER)
  wanted = {"class_names.txt", *(file for split in splits for file in _FILES[split])}
  folder = path if path.is_dir() else _unpacked(path, wanted, source.scratch)
  for name in sorted(wanted):
    if not (folder / name).is_file():
      raise DataError(f"{path} has no file {name}")
  names = (folder / "class_names.txt").read_text().split()
  if len(names) != 10:
    raise DataError(f"{path}, class_names.txt: expected 10 class names, found {len(names)}")
  return Opened({split: _records(path, folder, split) for split in splits}, {"label": names})


def _unpacked(path: pathlib.Path, wanted: set[str], scratch: pathlib.Path) -> pathlib.Path:
  """The wanted files, on disk: the unlabelled images alone are 2.8 GB, and are read in any order."""
  folder = scratch / _FOLDER
  folder.mkdir(exist_ok=True)

  def take(packed: str, file: IO[bytes]) -> None:
    name = pathlib.PurePosixPath(packed).name
    if name in wanted:
      with (folder / name).open("wb") as target:
        shutil.copyfileobj(file, target, 1 << 22)

  unpack(path, take)
  return folder


def _records(path: pathlib.Path, folder: pathlib.Path, split: str) -> Records:
  files = _FILES[split]
  size = (folder / files[0]).stat().st_size
  if size == 0 or size % _IMAGE_BYTES:
    raise DataError(f"{path}, {files[0]}: {size} bytes are no whole number of images of {_IMAGE_BYTES}")
  images = np.memmap(folder / files[0], np.uint8, "r").reshape(-1, 3, 96, 96)
  labels = np.full(len(images), -1, np.int64)
  if len(files) > 1:
    numbers = np.frombuffer((folder / files[1]).read_bytes(), np.uint8).astype(np.int64)
    labels = checked_labels(numbers - 1, len(images), 10, f"{path}, {files[1]}, less one")

  def example(index: int) -> dict[str, Any]:
    # [channel, column, row] -> [row, column, channel]
    image = np.ascontiguousarray(images[index].transpose(2, 1, 0))
    return {"image": png(image), "label": int(labels[index])}

  return Records(range(len(images)), example)


RECIPE = Recipe(
  name="stl10",
  files="stl10_binary.tar.gz (or unpacked: stl10_binary/)",
  homepage="https://cs.stanford.edu/~acoates/stl10/",
  counts={"train": 5000, "test": 8000, "unlabelled": 100000},
  default=("train", "test"),
  open=_open,
)
