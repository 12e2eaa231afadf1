"""What the readers of all archives share: named files, published checksums, records by number."""

from __future__ import annotations

import gzip
import hashlib
import io
import pathlib
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
import PIL.Image
import tqdm

from kwjax.errors import DataError


class Records(NamedTuple):
  """The examples of one split.

  Attributes:
    keys: what tensorflow-datasets orders the examples by: their numbers, or file names.
    example: number of an example in `keys` -> its features, images encoded.
  """

  keys: Sequence[int | str]
  example: Callable[[int], dict[str, Any]]


class Opened(NamedTuple):
  """An archive: its splits, and the names of the classes where the archive has them, by feature."""

  splits: dict[str, Records]
  class_names: dict[str, list[str]]


class Source(NamedTuple):
  """The folder of downloaded files, and how strict to be about them.

  Attributes:
    folder: of the user.
    checksums: published checksum or size of each file, by file name.
    verify: refuse files that are not the published ones.
    scratch: folder for temporary files, removed by the caller.
  """

  folder: pathlib.Path
  checksums: Mapping[str, str]
  verify: bool
  scratch: pathlib.Path

  def find(self, *names: str, required: bool = True) -> pathlib.Path | None:
    """The first of `names` (files or folders, official name first) that is there; files are checked.

    Raises:
      DataError: none is there, or a file is not the published one.
    """
    for name in names:
      path = self.folder / name
      if path.is_file():
        self._check(path)
      if path.exists():
        return path
    if required:
      raise DataError(f"{self.folder} has no {' or '.join(names)}: download it there first")
    return None

  def file(self, *names: str) -> pathlib.Path:
    """`find` of something that must be there."""
    path = self.find(*names)
    assert path is not None
    return path

  def _check(self, path: pathlib.Path) -> None:
    kind, _, expected = self.checksums.get(path.name, "").partition(":")
    if not self.verify or not kind:
      return
    found = str(path.stat().st_size) if kind == "bytes" else hash_file(path, kind)
    if found != expected:
      raise DataError(
        f"{path} is not the published file: its {'size' if kind == 'bytes' else kind.upper()} is {found}, expected"
        f" {expected}; download it again, or pass --no-verify if it was repacked on purpose"
      )


class Recipe(NamedTuple):
  """How one data set is made.

  Attributes:
    name: of tensorflow-datasets.
    files: the official file names, for help and errors.
    homepage: where they come from.
    counts: published number of examples by split; these splits are known.
    default: splits that are made unless others are asked for.
    open: reads the wanted splits.
    optional: default splits that are left out where their files are missing, as long as one is there.
    checksums: beside those that tensorflow-datasets has: file name -> "md5:...", "sha256:..." or "bytes:...".
  """

  name: str
  files: str
  homepage: str
  counts: dict[str, int]
  default: tuple[str, ...]
  open: Callable[[Source, Sequence[str]], Opened]
  optional: bool = False
  checksums: Mapping[str, str] = {}


def hash_file(path: pathlib.Path, algorithm: str) -> str:
  """Checksum of a file, with a progress bar for what takes more than a moment."""
  digest = hashlib.new(algorithm, usedforsecurity=False)
  size = path.stat().st_size
  with path.open("rb") as file, tqdm.tqdm(total=size, unit="B", unit_scale=True, desc=f"checking {path.name}") as bar:
    while block := file.read(1 << 22):
      digest.update(block)
      bar.update(len(block))
  return digest.hexdigest()


def unpack(path: pathlib.Path, take: Callable[[str, IO[bytes]], None]) -> None:
  """Hands `take` the name and content of each file of a .tar.gz in turn; the checksum of the whole is checked too.

  Raises:
    DataError: it is cut off or damaged.
  """
  try:
    # tarfile's own decompression leaves out the CRC at the end of a gzip file.
    with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
      for entry in archive:
        file = archive.extractfile(entry) if entry.isfile() else None
        if file is not None:
          take(entry.name, file)
      while stream.read(1 << 22):
        pass
  except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise DataError(f"{path} is cut off or damaged: {error}") from error


def png(pixels: np.ndarray) -> bytes:
  """Losslessly encoded uint8[h,w,1] or [h,w,3]."""
  file = io.BytesIO()
  PIL.Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "png")
  return file.getvalue()


def checked_labels(labels: np.ndarray, count: int, classes: int, where: str) -> np.ndarray:
  """Labels as i64[count].

  Raises:
    DataError: their number is another, or one is outside the classes.
  """
  labels = np.asarray(labels).astype(np.int64).reshape(-1)
  if len(labels) != count:
    raise DataError(f"{where}: {count} images, but {len(labels)} labels")
  if count and not (labels.min() >= 0 and labels.max() < classes):
    raise DataError(f"{where}: labels must be in [0, {classes}), found {labels.min()}..{labels.max()}")
  return labels
