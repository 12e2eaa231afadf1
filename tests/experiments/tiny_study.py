"""A study at the smallest size: the tiny network in the place of a loaded one, and images for it."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import tiny_network


@contextlib.contextmanager
def tiny_network_loaded() -> Iterator[None]:
  """Whatever --network says, a study gets the tiny network."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("experiments._harness.study.get_network", lambda *named, default: tiny_network())
    yield


def write_noise(path: pathlib.Path, *splits: str) -> None:
  """Ten random images a split, two of each class."""
  rng, arrays = np.random.default_rng(0), {}
  for split in splits:
    arrays[f"{split}_images"] = rng.integers(0, 256, (10, 8, 8, 3)).astype(np.uint8)
    arrays[f"{split}_labels"] = np.arange(10) % 5
  np.savez(path, **arrays)


def write_answered(path: pathlib.Path) -> None:
  """24 images that the tiny network labelled itself: 16 to train on, 8 to test on."""
  images = np.asarray(jax.random.uniform(jax.random.key(0), (24, 8, 8, 3)))
  pixels, labels = (images * 255).astype(np.uint8), np.asarray(jnp.argmax(tiny_network().apply(images), -1))
  parts = {"train": slice(16), "test": slice(16, None)}
  arrays = {f"{split}_images": pixels[part] for split, part in parts.items()}
  np.savez(path, **arrays, **{f"{split}_labels": labels[part] for split, part in parts.items()})


def command(folder: pathlib.Path, *more: str) -> list[str]:
  """Command line of a study in `folder / "run"`."""
  return ["--network", "tiny", "--preset", "smoke", "--devices", "1", "--workdir", str(folder / "run"), *more]
