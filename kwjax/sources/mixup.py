"""Mixing of two images into one input, which teacher and student both see; targets are mixed alike."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kwjax.errors import KwjaxError
from kwjax.network import Array


@dataclasses.dataclass(frozen=True)
class Mixup:
  """How images are mixed: x = lam x_i + (1 - lam) x_j, the partner j drawn uniformly from the whole set.

  "The Knowledge Within" gives "mix_rate = 0.5" and no more: it may be lam (`Mixup(lam=0.5)`) or the probability that an
  image is mixed (`Mixup(alpha=1.0, probability=0.5)`).

  Attributes:
    lam: weight of an image against its partner, in [0, 1].
    alpha: if given, lam is drawn from Beta(alpha, alpha) for each image instead.
    probability: that an image is mixed at all.
  """

  lam: float = 0.5
  alpha: float | None = None
  probability: float = 1.0

  def __post_init__(self) -> None:
    if not 0.0 <= self.lam <= 1.0 or not 0.0 <= self.probability <= 1.0:
      raise KwjaxError(f"mixup needs lam and probability in [0, 1], found {self.lam} and {self.probability}")
    if self.alpha is not None and not self.alpha > 0.0:
      raise KwjaxError(f"mixup needs alpha > 0 for Beta(alpha, alpha), found {self.alpha}")


class Mixing(NamedTuple):
  """Partners and weights of a whole batch, over all devices.

  Attributes:
    partner: i32[b], index of each image's partner in the set.
    lam: f32[b], weight of the image itself; 1 where it is not mixed.
  """

  partner: Array
  lam: Array


def draw_mixing(key: Array, count: int, num_images: int, mixup: Mixup) -> Mixing:
  """Draws partners and weights of a batch of `count` images from a set of `num_images`."""
  partner_key, lam_key, choice_key = jax.random.split(key, 3)
  partner = jax.random.randint(partner_key, (count,), 0, num_images)
  if mixup.alpha is None:
    lam = jnp.full((count,), mixup.lam, jnp.float32)
  else:
    lam = jax.random.beta(lam_key, mixup.alpha, mixup.alpha, (count,), jnp.float32)
  mixed = jax.random.bernoulli(choice_key, mixup.probability, (count,))
  return Mixing(partner, jnp.where(mixed, lam, 1.0))


def mix(images: Array, partners: Array, lam: Array) -> Array:
  """Mixed rows lam x_i + (1 - lam) x_j; images (or targets) and partners f32[b, ...], lam f32[b]."""
  weight = lam.reshape(-1, *[1] * (images.ndim - 1))
  return weight * images + (1.0 - weight) * partners
