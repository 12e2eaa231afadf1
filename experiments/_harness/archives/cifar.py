"""CIFAR-10 and CIFAR-100 of Krizhevsky (2009), the Python and the binary version, packed or unpacked."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from experiments._harness.archives.numpy_pickle import load_numpy_pickle
from experiments._harness.archives.recipe import Opened, Recipe, Records, Source, checked_labels, png, unpack
from kwjax.errors import DataError

_HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


class _Layout(NamedTuple):
  """What distinguishes the two sets: label features in the order of the binary form, their keys in the pickles."""

  labels: dict[str, str]
  classes: dict[str, int]
  python_folder: str
  binary_folder: str
  files: dict[str, tuple[str, ...]]
  meta: tuple[str, dict[str, str]]
  binary_names: dict[str, str]


_CIFAR10 = _Layout(
  labels={"label": "labels"},
  classes={"label": 10},
  python_folder="cifar-10-batches-py",
  binary_folder="cifar-10-batches-bin",
  files={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
  meta=("batches.meta", {"label": "label_names"}),
  binary_names={"label": "batches.meta.txt"},
)
_CIFAR100 = _Layout(
  labels={"coarse_label": "coarse_labels", "label": "fine_labels"},
  classes={"coarse_label": 20, "label": 100},
  python_folder="cifar-100-python",
  binary_folder="cifar-100-binary",
  files={"train": ("train",), "test": ("test",)},
  meta=("meta", {"coarse_label": "coarse_label_names", "label": "fine_label_names"}),
  binary_names={"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
)

Reader = Callable[[str], bytes]
Batch = tuple[np.ndarray, dict[str, np.ndarray]]


def _open(layout: _Layout, name: str, source: Source, splits: Sequence[str]) -> Opened:
  archive = f"cifar-{name.removeprefix('cifar')}"
  path = source.file(f"{archive}-python.tar.gz", f"{archive}-binary.tar.gz", layout.python_folder, layout.binary_folder)
  wanted = {file for split in splits for file in layout.files[split]}
  if path.name in (f"{archive}-python.tar.gz", layout.python_folder):
    read = _reader(path, layout.python_folder, {*wanted, layout.meta[0]})
    load: Callable[[str], Batch] = lambda file: _python_batch(layout, path, file, read(file))
    meta = _load_pickle(path, layout.meta[0], read(layout.meta[0]))
    names: dict[str, list[str]] = {feature: meta.get(key, []) for feature, key in layout.meta[1].items()}
  else:
    read = _reader(path, layout.binary_folder, {*(f"{file}.bin" for file in wanted), *layout.binary_names.values()})
    load = lambda file: _binary_batch(layout, path, f"{file}.bin", read(f"{file}.bin"))
    names = {feature: read(file).decode("ascii", "replace").split() for feature, file in layout.binary_names.items()}
  for feature, count in layout.classes.items():
    texts = names[feature]
    if not isinstance(texts, list) or len(texts) != count or not all(isinstance(text, str) for text in texts):
      raise DataError(f"{path}: expected {count} class names for {feature}, found {str(names[feature])[:80]}")
  return Opened(
    {split: _records(layout, path, split, [load(f) for f in layout.files[split]]) for split in splits}, names
  )


def _reader(path: pathlib.Path, folder: str, members: set[str]) -> Reader:
  """Content of a file of the archive by name; one pass over a packed one, whose files cannot be read by themselves."""
  contents: dict[str, bytes] = {}

  def take(packed: str, file: IO[bytes]) -> None:
    name = packed.removeprefix("./").removeprefix(f"{folder}/")
    if name in members:
      contents[name] = file.read()

  if path.is_dir():
    contents.update({m: (path / m).read_bytes() for m in members if (path / m).is_file()})
  else:
    unpack(path, take)

  def read(name: str) -> bytes:
    if name not in contents:
      raise DataError(f"{path} has no file {folder}/{name}")
    return contents[name]

  return read


def _load_pickle(path: pathlib.Path, file: str, data: bytes) -> dict[str, Any]:
  found = load_numpy_pickle(data, f"{path}, {file}")
  if not isinstance(found, dict):
    raise DataError(f"{path}, {file}: expected a pickled dict, found {type(found).__name__}")
  return found


def _python_batch(layout: _Layout, path: pathlib.Path, file: str, data: bytes) -> Batch:
  batch = _load_pickle(path, file, data)
  pixels = batch.get("data")
  if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
    raise DataError(f"{path}, {file}: expected data uint8[n,3072], found {getattr(pixels, 'shape', type(pixels))}")
  labels = {feature: batch.get(key) for feature, key in layout.labels.items()}
  for feature, values in labels.items():
    if not isinstance(values, list) or not all(type(v) is int for v in values):
      raise DataError(f"{path}, {file}: expected a list of numbers under {layout.labels[feature]!r}")
  return pixels, {feature: np.array(values, np.int64) for feature, values in labels.items()}


def _binary_batch(layout: _Layout, path: pathlib.Path, file: str, data: bytes) -> Batch:
  """Records of one byte a label and 3072 bytes of pixels."""
  size = len(layout.labels) + 3072
  if len(data) % size:
    raise DataError(f"{path}, {file}: {len(data)} bytes are no whole number of records of {size}")
  rows = np.frombuffer(data, np.uint8).reshape(-1, size)
  return rows[:, len(layout.labels) :], {feature: rows[:, i] for i, feature in enumerate(layout.labels)}


def _records(layout: _Layout, path: pathlib.Path, split: str, batches: list[Batch]) -> Records:
  pixels = np.concatenate([batch[0] for batch in batches])
  labels = {
    feature: checked_labels(
      np.concatenate([batch[1][feature] for batch in batches]), len(pixels), count, f"{path}, {split}, {feature}"
    )
    for feature, count in layout.classes.items()
  }

  def example(index: int) -> dict[str, Any]:
    # Three planes of 32x32, red first, each row by row.
    image = np.ascontiguousarray(pixels[index].reshape(3, 32, 32).transpose(1, 2, 0))
    numbers = {feature: int(values[index]) for feature, values in labels.items()}
    return {"id": f"{split}_{index:05d}", "image": png(image), **numbers}

  return Records(range(len(pixels)), example)


def _recipe(name: str, layout: _Layout, md5: dict[str, str]) -> Recipe:
  archive = f"cifar-{name.removeprefix('cifar')}"
  return Recipe(
    name=name,
    files=f"{archive}-python.tar.gz or {archive}-binary.tar.gz (or unpacked: {layout.python_folder}/ or {layout.binary_folder}/)",
    homepage=_HOMEPAGE,
    counts={"train": 50000, "test": 10000},
    default=("train", "test"),
    open=lambda source, splits: _open(layout, name, source, splits),
    checksums={f"{archive}-{version}.tar.gz": f"md5:{value}" for version, value in md5.items()},
  )


# The MD5 sums stand on the home page.
RECIPES = (
  _recipe(
    "cifar10",
    _CIFAR10,
    {"python": "c58f30108f718f92721af3b95e74349a", "binary": "c32a1d4ab5d03f1284b67883e8d87530"},
  ),
  _recipe(
    "cifar100",
    _CIFAR100,
    {"python": "eb9058c3a382ffc7106e4002c42a8d85", "binary": "03b5dce01913d631647c71ecec9e9cb8"},
  ),
)
