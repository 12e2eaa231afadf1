"""MNIST and its drop-in replacements: four idx files, gzipped or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments._harness.archives.recipe import Opened, Recipe, Records, Source, checked_labels, png
from kwjax.errors import DataError
from kwjax.runtime.data.idx import read_idx

_PREFIX = {"train": "train", "test": "t10k"}


def _open(source: Source, splits: Sequence[str]) -> Opened:
  return Opened({split: _records(source, split) for split in splits}, {})


def _records(source: Source, split: str) -> Records:
  images_path, labels_path = (
    source.file(f"{_PREFIX[split]}-{kind}-ubyte.gz", f"{_PREFIX[split]}-{kind}-ubyte")
    for kind in ("images-idx3", "labels-idx1")
  )
  images = read_idx(images_path)
  if images.shape[1:] != (28, 28):
    raise DataError(f"{images_path}: expected images of 28x28, found shape {list(images.shape)}")
  labels = checked_labels(read_idx(labels_path), len(images), 10, str(labels_path))

  def example(index: int) -> dict[str, Any]:
    return {"image": png(images[index, :, :, None]), "label": int(labels[index])}

  return Records(range(len(images)), example)


def _recipe(name: str, homepage: str) -> Recipe:
  return Recipe(
    name=name,
    files="train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz",
    homepage=homepage,
    counts={"train": 60000, "test": 10000},
    default=("train", "test"),
    open=_open,
  )


RECIPES = (
  _recipe("mnist", "http://yann.lecun.com/exdb/mnist/"),
  _recipe("fashion_mnist", "https://github.com/zalandoresearch/fashion-mnist"),
  _recipe("kmnist", "http://codh.rois.ac.jp/kmnist/"),
)
