"""Sources of images: arrays, folders and zips. Each reads one image as f32[h,w,c] in [0, 1]."""

from __future__ import annotations

import dataclasses
import io
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable
from typing import Protocol

import numpy as np

from kwjax.errors import DataError
from kwjax.runtime.data.folders import IGNORED, SUFFIXES, class_folders, class_indices, names_below

_SPLITS = {"test": ("test",), "validation": ("validation", "val", "valid"), "train": ("train",)}
# What decoders raise for a damaged or hostile file: `decode` OSError, SyntaxError (PNG) and ValueError; zipfile
# BadZipFile, zlib.error (an Exception of its own), EOFError, RuntimeError (a password, an unknown compression); NumPy
# MemoryError for an array that claims to be huge.
UNREADABLE = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  zipfile.BadZipFile,
  zlib.error,
  RuntimeError,
  MemoryError,
)

Shape = tuple[int, int, int]


class Reader(Protocol):
  """Images by number."""

  @property
  def count(self) -> int:
    """Number of images."""

  def native_shape(self) -> Shape:
    """Shape of the first image as stored."""

  def read(self, index: int, shape: Shape) -> np.ndarray:
    """Image `index` as f32[shape] in [0, 1]."""


@dataclasses.dataclass(frozen=True)
class ArrayReader:
  """Images uint8[n,h,w,c] or f32[n,h,w,c] in [0, 1]; `grey_to_rgb` repeats a grey channel where 3 are wanted."""

  pixels: np.ndarray
  name: str
  grey_to_rgb: bool = False
  count: int = -1

  def __post_init__(self) -> None:
    if self.count < 0:
      object.__setattr__(self, "count", len(self.pixels))

  def native_shape(self) -> Shape:
    """Shape of every image."""
    height, width, channels = self.pixels.shape[1:]
    return height, width, channels

  def read(self, index: int, shape: Shape) -> np.ndarray:
    """Image `index` as f32[shape] in [0, 1]."""
    return fit(self.pixels[index], shape, self.name, grey_to_rgb=self.grey_to_rgb, photographs=False)


@dataclasses.dataclass(frozen=True)
class FileReader:
  """Encoded images by name; `load` returns the bytes of one."""

  place: str
  names: tuple[str, ...]
  load: Callable[[str], bytes]
  count: int = -1

  def __post_init__(self) -> None:
    if self.count < 0:
      object.__setattr__(self, "count", len(self.names))

  def native_shape(self) -> Shape:
    """Size of the first image, as RGB."""
    height, width, _ = self._decode(self.names[0], 3).shape
    return height, width, 3

  def read(self, index: int, shape: Shape) -> np.ndarray:
    """Image `index` as f32[shape] in [0, 1]; grey, palette and CMYK files are converted to its channels."""
    name = self.names[index]
    return fit(self._decode(name, shape[2]), shape, f"{self.place}, image {name}")

  def _decode(self, name: str, channels: int) -> np.ndarray:
    if channels not in (1, 3):
      raise DataError(f"{self.place}: image files have 1 or 3 channels, {channels} are asked for")
    try:
      return decode(self.load(name), channels)
    except UNREADABLE as error:
      raise DataError(f"{self.place}: cannot read image {name}: {error}") from error


def decode(data: bytes, channels: int) -> np.ndarray:
  """Decode a JPEG, PNG, ... into [h,w,channels], 1 (grey) or 3 (RGB): uint8, or f32 in [0, 1] of more than 8 bits.

  Raises:
    ValueError: grey values of 32 bits or floats lie outside the range that is known. PIL raises others for a bad file.
  """
  import PIL.Image

  try:
    with PIL.Image.open(io.BytesIO(data)) as image:
      if image.mode == "F" or image.mode.startswith("I"):
        return np.repeat(_deep_grey(np.asarray(image), image.mode)[:, :, None], channels, axis=2)
      pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
  except PIL.Image.DecompressionBombError as error:
    raise ValueError(str(error)) from error  # else an Exception of its own
  return pixels.reshape(*pixels.shape[:2], channels)


def _deep_grey(pixels: np.ndarray, mode: str) -> np.ndarray:
  """Grey values f32[h,w] in [0, 1]; PIL would clip them at 255."""
  white = 1 if mode == "F" else 65535  # PIL has 16 bits in modes I;16 and, of some files, I
  low, high = pixels.min(initial=0), pixels.max(initial=0)
  if not (low >= 0 and high <= white):
    raise ValueError(f"expected grey values from 0 to {white} (PIL's mode {mode}), found {low:g} to {high:g}")
  return pixels.astype(np.float32) / np.float32(white)


def describe_shape(shape: tuple[int, ...]) -> str:
  """`[n,h,w]` for an error message."""
  return f"[{','.join(map(str, shape))}]"


def fit(
  pixels: np.ndarray, shape: Shape, name: str, *, grey_to_rgb: bool = False, photographs: bool = True
) -> np.ndarray:
  """One image in the wanted shape, f32[shape] in [0, 1]; see `load_data` for the rule.

  Args:
    pixels: uint8[h,w,c], or f32[h,w,c] in [0, 1].
    shape: (height, width, channels) wanted.
    name: of the image, for errors.
    grey_to_rgb: repeat one channel three times if three are wanted.
    photographs: crop as in the usual ImageNet evaluation; else the image is of a set of one size and shown whole.

  Raises:
    DataError: the channels differ, or an image of a set of one size is smaller than wanted.
  """
  if grey_to_rgb and pixels.shape[2] == 1 and shape[2] == 3:
    pixels = np.repeat(pixels, 3, axis=2)
  if pixels.shape[2] != shape[2]:
    raise DataError(f"{name}: expected {shape[2]} channels, found an image {describe_shape(pixels.shape)}")
  if pixels.shape[:2] != shape[:2]:
    if pixels.shape[:2] == (28, 28) and shape[:2] == (32, 32):
      # Interpolation would blur the strokes and change the statistics; a border only adds background.
      pixels = np.pad(pixels, ((2, 2), (2, 2), (0, 0)))
    elif photographs or (pixels.shape[0] >= shape[0] and pixels.shape[1] >= shape[1]):
      pixels = _resize_and_crop(pixels, shape[0], shape[1], 256 / 224 if photographs else 1.0)
    else:
      found = f"{pixels.shape[0]}x{pixels.shape[1]}"
      raise DataError(f"{name}: images of {found} pixels are smaller than the wanted {shape[0]}x{shape[1]}")
  if pixels.dtype == np.uint8:
    return pixels.astype(np.float32) / np.float32(255)
  return np.clip(pixels, 0, 1)


def _resize_and_crop(pixels: np.ndarray, height: int, width: int, margin: float) -> np.ndarray:
  # 256/224 is the margin of the usual ImageNet evaluation; both sides must still cover the crop of a wide shape.
  side = round(max(height, width) * margin)
  old_height, old_width = pixels.shape[:2]
  if min(old_height, old_width) != side:
    scale = side / min(old_height, old_width)
    # Without PIL's `reducing_gap`, which changes the result.
    pixels = _resize(pixels, max(int(old_height * scale), side), max(int(old_width * scale), side))
  top, left = round((pixels.shape[0] - height) / 2), round((pixels.shape[1] - width) / 2)
  return pixels[top : top + height, left : left + width]


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
  import PIL.Image

  # One channel at a time: any number of channels works, and floats keep their precision in mode "F".
  channels = [PIL.Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(pixels.shape[2])]
  bilinear = PIL.Image.Resampling.BILINEAR
  return np.stack([np.asarray(channel.resize((width, height), bilinear)) for channel in channels], axis=-1)


def checked_pixels(images: np.ndarray, name: str) -> np.ndarray:
  """Images as uint8[n,h,w,c] or f32[n,h,w,c] in [0, 1].

  Raises:
    DataError: another number of axes, no images, a kind that is not a number, NaN, or values outside [0, 255] for
      integers and [0, 1] for floats.
  """
  if images.ndim != 4 or images.dtype.kind not in "iuf":
    raise DataError(f"{name}: expected numbers [n,h,w,c], found {images.dtype}{describe_shape(images.shape)}")
  if 0 in images.shape:
    raise DataError(f"{name} holds no images: {describe_shape(images.shape)}")
  if images.dtype == np.uint8:
    return images
  upper = 1 if images.dtype.kind == "f" else 255
  low, high = images.min(), images.max()
  # NaN fails every comparison, so the test states what must hold.
  if not (low >= 0 and high <= upper):
    raise DataError(f"{name}: {images.dtype} pixels must be in [0, {upper}] without NaN, found {low:g}..{high:g}")
  return images.astype(np.float32 if upper == 1 else np.uint8)


def open_path(path: pathlib.Path, split: str | None, num_classes: int | None) -> tuple[Reader, np.ndarray | None]:
  """Open an .npz, a zip or a folder as `load_data` describes; labels are not checked yet.

  Raises:
    DataError: the path does not exist, cannot be read, or has an unknown form.
  """
  if path.suffix == ".npz" and path.is_file():
    return _open_npz(path, split)
  if not path.exists():
    raise DataError(f"no such data: {path}")
  if path.is_dir():
    folder = path / split if split else path
    names, folders = names_below(folder)
    return _open_files(str(folder), names, folders, lambda name: (folder / name).read_bytes(), num_classes)
  if zipfile.is_zipfile(path):
    try:
      archive = zipfile.ZipFile(path)
    except UNREADABLE as error:
      raise DataError(f"cannot read {path}: {error}") from error
    prefix = f"{split}/" if split else ""
    names = sorted(n for n in archive.namelist() if pathlib.PurePosixPath(n).suffix.lower() in SUFFIXES)
    chosen = [n for n in names if n.startswith(prefix)]
    folders = {n.rstrip("/") for n in archive.namelist() if n.endswith("/") and n.startswith(prefix)}
    return _open_files(str(path), chosen, folders, archive.read, num_classes)
  raise DataError(f"{path} is neither an .npz, a zip (or it is damaged) nor a folder of images")


def _open_files(
  place: str, names: list[str], folders: set[str], load: Callable[[str], bytes], num_classes: int | None
) -> tuple[Reader, np.ndarray | None]:
  names = [n for n in names if not any(part.startswith(IGNORED) for part in n.split("/"))]
  if not names:
    raise DataError(f"{place} holds no images ({', '.join(sorted(SUFFIXES))})")
  parents = sorted({n.rpartition("/")[0] for n in names})
  source = FileReader(place, tuple(names), load)
  if len(parents) == 1:
    matches = [re.match(r"(\d+)_", n.rpartition("/")[2]) for n in names]
    if not any(matches):
      return source, None
    if not all(matches):
      raise DataError(f"{place}: image {names[matches.index(None)]} is not named CLASS_... as the others are")
    return source, np.array([int(match[1]) for match in matches if match])
  if "" in parents:
    loose = next(n for n in names if "/" not in n)
    raise DataError(f"{place} holds images both in class folders and outside of them, such as {loose}")
  classes = class_folders(names, folders, num_classes, place)
  index = class_indices([folder.rpartition("/")[2] for folder in classes], num_classes, place)
  depth = classes[0].count("/")
  return source, np.array([index[n.split("/")[depth]] for n in names])


def _open_npz(path: pathlib.Path, split: str | None) -> tuple[Reader, np.ndarray | None]:
  try:
    # np.load leaves a path open that is no archive.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
      keys = _npz_keys(path, list(arrays.files), split)
      images, labels = (arrays[key] if key else None for key in keys)
  except UNREADABLE as error:
    if isinstance(error, DataError):
      raise
    raise DataError(f"cannot read {path}: {error}") from error
  assert images is not None
  name = f"{path.name}, {keys[0]}"
  return ArrayReader(checked_pixels(images, name), name), labels


def _npz_keys(path: pathlib.Path, keys: list[str], split: str | None) -> tuple[str, str | None]:
  aliases = [a for names in _SPLITS.values() for a in names] if split is None else _SPLITS.get(split, (split,))
  pairs = [pair for a in aliases for pair in ((f"{a}_images", f"{a}_labels"), (f"x_{a}", f"y_{a}"))]
  if split is None:
    pairs.insert(2, ("images", "labels"))
  for images, labels in pairs:
    if images in keys:
      return images, labels if labels in keys else None
  raise DataError(f"{path} has the arrays {sorted(keys)}, expected one of {[images for images, _ in pairs]}")
