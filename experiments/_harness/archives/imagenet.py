"""ImageNet (ILSVRC 2012), the original tar files or the usual folders of class folders."""

from __future__ import annotations

import functools
import io
import pathlib
import re
import tarfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import PIL.Image
import tensorflow_datasets as tfds
import tqdm

from experiments._harness.archives.recipe import Opened, Recipe, Records, Source
from kwjax.errors import DataError

_TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
_FOLDERS = {"train": ("train",), "validation": ("val", "validation")}
_SUFFIXES = {".jpeg", ".jpg", ".png"}
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)


class _Image(NamedTuple):
  """One image file: its name, class, and how to get its bytes."""

  name: str
  label: str
  load: Callable[[], bytes]


def _open(source: Source, splits: Sequence[str]) -> Opened:
  found = {}
  for split in splits:
    path = source.find(_TARS[split], *_FOLDERS[split], required=False)
    if path is not None:
      found[split] = _records(path, split)
  return Opened(found, {})


def _records(path: pathlib.Path, split: str) -> Records:
  if path.is_dir():
    images = _folder_images(path, split)
  elif split == "train":
    images = _train_tar(path)
  else:
    images = [_Image(n, _validation_label(path, n), load) for n, load in _tar_files(path)]
  if not images:
    raise DataError(f"{path} holds no images")
  known = set(wnids())
  for image in images:
    if image.label not in known:
      raise DataError(f"{path}: {image.label} is none of the 1000 ImageNet classes (n01440764, ...)")

  def example(index: int) -> dict[str, Any]:
    image = images[index]
    return {"file_name": image.name, "image": _as_rgb_jpeg(image, path), "label": image.label}

  return Records([image.name for image in images], example)


def wnids() -> list[str]:
  return tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()


@functools.cache
def _validation_labels() -> list[str]:
  return tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()


def _validation_label(path: pathlib.Path, name: str) -> str:
  """The published class of a validation image: entry NUMBER of a list that tensorflow-datasets carries."""
  labels = _validation_labels()
  match = _VALIDATION_NAME.fullmatch(name)
  if match is None or not 1 <= int(match[1]) <= len(labels):
    raise DataError(f"{path}: {name} is no validation image, expected ILSVRC2012_val_00000001.JPEG to 00050000")
  return labels[int(match[1]) - 1]


def _folder_images(path: pathlib.Path, split: str) -> list[_Image]:
  images = []
  files = (f for f in path.rglob("*") if f.suffix.lower() in _SUFFIXES and not f.name.startswith("."))
  for file in tqdm.tqdm(files, desc=f"listing {path.name}", unit="file"):
    flat = file.parent == path and split == "validation"
    label = _validation_label(path, file.name) if flat else file.parent.name
    images.append(_Image(file.name, label, file.read_bytes))
  return images


def _train_tar(path: pathlib.Path) -> list[_Image]:
  """A tar file of one tar file a class."""
  images = []
  try:
    with tarfile.open(path, "r:") as outer:
      for member in tqdm.tqdm(outer, total=1000, desc=f"listing {path.name}", unit="class"):
        inner = outer.extractfile(member) if member.name.endswith(".tar") else None
        if inner is not None:
          with tarfile.open(fileobj=inner, mode="r:") as files:
            label = pathlib.PurePosixPath(member.name).stem
            images += [
              _Image(file.name, label, _slice(path, member.offset_data + file.offset_data, file.size))
              for file in files
              if file.isfile()
            ]
  except (tarfile.TarError, EOFError, OSError) as error:
    raise DataError(f"{path} is cut off or damaged: {error}") from error
  return images


def _tar_files(path: pathlib.Path) -> list[tuple[str, Callable[[], bytes]]]:
  try:
    with tarfile.open(path, "r:") as files:
      return [
        (pathlib.PurePosixPath(f.name).name, _slice(path, f.offset_data, f.size))
        for f in tqdm.tqdm(files, desc=f"listing {path.name}", unit="file")
        if f.isfile()
      ]
  except (tarfile.TarError, EOFError, OSError) as error:
    raise DataError(f"{path} is cut off or damaged: {error}") from error


def _slice(path: pathlib.Path, offset: int, size: int) -> Callable[[], bytes]:
  """Part of a file; the images are written in another order than they lie in the archive."""

  def load() -> bytes:
    with path.open("rb") as file:
      file.seek(offset)
      data = file.read(size)
    if len(data) != size:
      raise OSError(f"cut off after {len(data)} of {size} bytes")
    return data

  return load


def _as_rgb_jpeg(image: _Image, path: pathlib.Path) -> bytes:
  """The bytes of a grey or RGB JPEG as they are; of the 22 CMYK images and the one PNG, an RGB JPEG of quality 95."""
  try:
    data = image.load()
    with PIL.Image.open(io.BytesIO(data)) as opened:
      if opened.format == "JPEG" and opened.mode in ("RGB", "L"):
        return data
      file = io.BytesIO()
      opened.convert("RGB").save(file, "jpeg", quality=95)
      return file.getvalue()
  except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
    raise DataError(f"{path}: cannot read image {image.name}: {error}") from error


RECIPE = Recipe(
  name="imagenet2012",
  files="ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or the folders train/nXXXXXXXX/*.JPEG and"
  " val/nXXXXXXXX/*.JPEG (or val/ILSVRC2012_val_XXXXXXXX.JPEG); one of the two is enough",
  homepage="https://image-net.org/download-images",
  counts={"train": 1281167, "validation": 50000},
  default=("train", "validation"),
  open=_open,
  optional=True,
)
