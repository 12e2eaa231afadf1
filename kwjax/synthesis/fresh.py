"""Noise as a function that draws it anew at every step, in place of a set of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kwjax.errors import KwjaxError
from kwjax.synthesis.dead_leaves_model import (
  LEAF_SHAPES,
  MAX_LEAVES,
  MIXED,
  RADII,
  checked_radii,
  lay_leaves,
  shape_indices,
)
from kwjax.synthesis.noise import gaussian_images

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class FreshGaussian:
  """What `fresh_gaussian` returns; equal settings are equal functions."""

  mean: tuple[float, ...]
  std: tuple[float, ...]
  clip: bool

  def __call__(self, key: Array, images: Array) -> Array:
    """Noise f32[b,h,w,c] in place of images of that shape."""
    count, height, width, channels = images.shape
    return gaussian_images(key, count, (height, width, channels), self.mean, self.std, clip=self.clip)

  def to_json(self) -> dict[str, Any]:
    """Name and settings, by which a resumed run knows that it is the same noise."""
    return {"name": "fresh_gaussian", **dataclasses.asdict(self)}


def fresh_gaussian(mean: Sequence[float], std: Sequence[float], *, clip: bool = False) -> FreshGaussian:
  """The images of `gaussian_images` as a function that draws them anew; `distill` takes it in place of images.

  Args:
    mean: per channel, in [0,1] pixel units; the network's `input_mean` for N(0, 1) in its normalized input space.
    std: the same units; `input_std` for that.
    clip: as in `gaussian_images`.

  Returns:
    `(PRNG key, images f32[b,h,w,c]) -> noise f32[b,h,w,c]`, of the images only their shape; pure and hashable.

  Raises:
    KwjaxError: mean and std are not of one length, or a std is not positive.

  Source: Raikwar & Mishra (2022), who draw the noise of every step anew, in normalized space.
  """
  if len(mean) != len(std) or not all(value > 0.0 for value in std):
    raise KwjaxError(f"Gaussian noise needs a mean and a positive std a channel, found {mean} and {std}")
  return FreshGaussian(tuple(map(float, mean)), tuple(map(float, std)), clip)


@dataclasses.dataclass(frozen=True)
class FreshDeadLeaves:
  """What `fresh_dead_leaves` returns; equal settings are equal functions."""

  shapes: tuple[str, ...]
  radii: tuple[float, float]
  max_leaves: int

  def __call__(self, key: Array, images: Array) -> Array:
    """Dead leaves f32[b,h,w,c] in place of images of that shape."""
    count, height, width, channels = images.shape
    return lay_leaves(
      key,
      jnp.int32(0),
      count=count,
      image_shape=(height, width, channels),
      kinds=shape_indices(self.shapes),
      radii=self.radii,
      max_leaves=self.max_leaves,
    )

  def to_json(self) -> dict[str, Any]:
    """Name and settings, by which a resumed run knows that it is the same noise."""
    return {"name": "fresh_dead_leaves", **dataclasses.asdict(self)}


def fresh_dead_leaves(
  *, shapes: str | Sequence[str] = MIXED, radii: tuple[float, float] = RADII, max_leaves: int = MAX_LEAVES
) -> FreshDeadLeaves:
  """The images of `dead_leaves` as a function that draws them anew; `distill` takes it in place of images.

  Args:
    shapes: "mixed", or one or several of the shapes of `dead_leaves`.
    radii: smallest and largest radius as shares of the longer side.
    max_leaves: a pixel that none of them covers stays black.

  Returns:
    `(PRNG key, images f32[b,h,w,c]) -> dead leaves f32[b,h,w,c] in [0,1]`, of the images only their shape; pure and
    hashable.

  Raises:
    KwjaxError: as `dead_leaves`.
  """
  return FreshDeadLeaves(tuple(LEAF_SHAPES[kind] for kind in shape_indices(shapes)), checked_radii(radii), max_leaves)
