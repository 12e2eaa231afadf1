"""Noise that every step draws anew: Gaussian pixels, dead leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kwjax.errors import KwjaxError
from kwjax.network import Array
from kwjax.runtime.devices import parallel
from kwjax.sources.base import Batch, Source
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

ImageShape = tuple[int, int, int]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FreshNoise(Source[tuple[()]]):
  """Images that no network made, all of them new at every step; nothing is learnt.

  Attributes:
    image_shape: (h, w, c).
    noise: `(PRNG key, image_shape) -> one image f32[h,w,c]`, pure and hashable.

  Source: Raikwar & Mishra (2022), who draw the noise of every step anew.
  """

  image_shape: ImageShape
  noise: Callable[[Array, ImageShape], Array]

  @classmethod
  def gaussian(
    cls, image_shape: ImageShape, mean: Sequence[float], std: Sequence[float], *, clip: bool = False
  ) -> FreshNoise:
    """The images of `gaussian_images`: independent pixels N(mean, std^2).

    Args:
      image_shape: (h, w, c).
      mean: per channel, in [0,1] pixel units; the network's `input_mean` for N(0, 1) in its normalized input space.
      std: the same units; `input_std` for that.
      clip: as in `gaussian_images`.

    Raises:
      KwjaxError: mean and std are not one value a channel, or a std is not positive.
    """
    if not len(mean) == len(std) == image_shape[2] or not all(value > 0.0 for value in std):
      raise KwjaxError(f"Gaussian noise needs a mean and a positive std a channel, found {mean} and {std}")
    return cls(_shape(image_shape), Gaussian(tuple(map(float, mean)), tuple(map(float, std)), clip))

  @classmethod
  def dead_leaves(
    cls,
    image_shape: ImageShape,
    *,
    shapes: str | Sequence[str] = MIXED,
    radii: tuple[float, float] = RADII,
    max_leaves: int = MAX_LEAVES,
  ) -> FreshNoise:
    """The images of `kwjax.dead_leaves`.

    Args:
      image_shape: (h, w, c).
      shapes: "mixed", or one or several of the shapes of `kwjax.dead_leaves`.
      radii: smallest and largest radius as shares of the longer side.
      max_leaves: a pixel that none of them covers stays black.

    Raises:
      KwjaxError: as `kwjax.dead_leaves`.
    """
    kinds = tuple(LEAF_SHAPES[kind] for kind in shape_indices(shapes))
    return cls(_shape(image_shape), DeadLeaves(kinds, checked_radii(radii), max_leaves))

  def init(self, key: Array) -> tuple[()]:
    """No state, whatever the PRNG key."""
    del key
    return ()

  def draw(self, state: tuple[()], key: Array, n: int, axis_name: str | None = None) -> Batch:
    """Images each of a key of its own, without targets.

    Args:
      state: none.
      key: PRNG key of the step.
      n: images over all devices.
      axis_name: mapped axis of the devices.
    """
    del state
    # Every other key: the rest are those of partners in a set that is mixed, so that a seed gives the images it always gave.
    keys = jax.random.split(key, (n, 2))[parallel.batch_rows(n, axis_name), 0]
    return Batch(jax.vmap(lambda one: self.noise(one, self.image_shape))(keys))


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """N(mean, std^2) a channel, clipped to [0,1] or not."""

  mean: tuple[float, ...]
  std: tuple[float, ...]
  clip: bool

  def __call__(self, key: Array, image_shape: ImageShape) -> Array:
    """One image f32[h,w,c]."""
    return gaussian_images(key, 1, image_shape, self.mean, self.std, clip=self.clip)[0]


@dataclasses.dataclass(frozen=True)
class DeadLeaves:
  """Flat-coloured shapes that hide one another."""

  shapes: tuple[str, ...]
  radii: tuple[float, float]
  max_leaves: int

  def __call__(self, key: Array, image_shape: ImageShape) -> Array:
    """One image f32[h,w,c] in [0,1]."""
    kinds = shape_indices(self.shapes)
    return lay_leaves(
      key,
      jnp.int32(0),
      count=1,
      image_shape=image_shape,
      kinds=kinds,
      radii=self.radii,
      max_leaves=self.max_leaves,
    )[0]


def _shape(image_shape: ImageShape) -> ImageShape:
  """Hashable also where it came as a list."""
  height, width, channels = image_shape
  return (height, width, channels)
