"""Which images make a batch: drawn over all devices at once, so that neither their number nor a restart matters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from kwjax.network import Array
from kwjax.sources.mixup import Mixing, Mixup, draw_mixing, mix

Augment = Callable[[Array, Array], Array]
"""`(key, images f32[b,h,w,c] in [0,1]) -> the same shape`; called with one image at a time, each with its own key.

Two functions count as the same in a resumed run if their names agree, or, of an object with a method `to_json`, what that
returns."""

ORDER, MIX, DRAW, INIT, REFRESH = range(5)
"""Independent streams of a run's randomness, folded into its key."""


class Plan(NamedTuple):
  """One batch as indices into the image set, over all devices.

  Attributes:
    chosen: i32[b].
    mixing: partners and weights, or None without mixup.
    keys: PRNG keys [b, 2] of the augmentation of image and partner, or None without augmentation.
  """

  chosen: Any
  mixing: Mixing | None
  keys: Array | None


def planner(
  key: Array, num_images: int, batch_size: int, *, mixup: Mixup | None = None, augments: bool = False
) -> Callable[[int], Plan]:
  """Step -> plan of its batch, a pure function of key and step.

  Each epoch is a permutation of the set drawn from `fold_in(key, epoch)`; batches follow one another through the
  epochs, so the one that meets the end of an epoch continues with the next and no image is dropped.

  Args:
    key: PRNG key of the run.
    num_images: size of the set.
    batch_size: images a batch, over all devices.
    mixup: how images are mixed, or None.
    augments: whether there is an augmentation.
  """
  order_key, mix_key, augment_key = (jax.random.fold_in(key, stream) for stream in (ORDER, MIX, DRAW))

  @functools.lru_cache(maxsize=2)
  def order(epoch: int) -> np.ndarray:
    return np.asarray(jax.random.permutation(jax.random.fold_in(order_key, epoch), num_images), np.int32)

  def plan(step: int) -> Plan:
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    first, last = int(positions[0]) // num_images, int(positions[-1]) // num_images
    parts = [order(e)[positions[positions // num_images == e] % num_images] for e in range(first, last + 1)]
    drawn = _draw(mix_key, augment_key, step, num_images, batch_size, mixup, augments)
    return Plan(np.concatenate(parts), *drawn)

  return plan


def random_plan(key: Array, num_images: int, batch_size: int, *, mixup: Mixup | None, augments: bool) -> Plan:
  """A batch of images drawn independently of one another and of every epoch; pure in the key, also under jit."""
  order_key, mix_key, augment_key = (jax.random.fold_in(key, stream) for stream in (ORDER, MIX, DRAW))
  chosen = jax.random.randint(order_key, (batch_size,), 0, num_images)
  return Plan(chosen, *_draw(mix_key, augment_key, 0, num_images, batch_size, mixup, augments))


@functools.partial(jax.jit, static_argnames=("num_images", "batch_size", "mixup", "augments"))
def _draw(
  mix_key: Array,
  augment_key: Array,
  step: Array | int,
  num_images: int,
  batch_size: int,
  mixup: Mixup | None,
  augments: bool,
) -> tuple[Mixing | None, Array | None]:
  mixing, keys = None, None
  if mixup is not None:
    mixing = draw_mixing(jax.random.fold_in(mix_key, step), batch_size, num_images, mixup)
  if augments:
    keys = jax.random.split(jax.random.fold_in(augment_key, step), (batch_size, 2))
  return mixing, keys


def take(plan: Plan, rows: Any) -> Plan:
  """The plan of some rows i32[m] of a batch, on the host or inside a step."""
  return Plan(*jax.tree.map(lambda leaf: leaf[rows], (plan.chosen, plan.mixing, plan.keys)))


def gather(values: Any, plan: Plan) -> tuple[Any, Any]:
  """Rows of `values` and those of the partners (None without mixup), as they are stored, on the host or on a device."""
  return values[plan.chosen], None if plan.mixing is None else values[plan.mixing.partner]


def mixed(values: Array, partners: Array | None, plan: Plan) -> Array:
  """Rows f32[b, ...] mixed with those of their partners as the plan says; as they are without mixup."""
  if partners is None or plan.mixing is None:
    return values
  return mix(values, partners, plan.mixing.lam)
