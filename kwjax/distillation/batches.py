"""Which images make a batch: drawn over all devices at once, so that neither their number nor a restart matters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.distillation.config import Augment, DistillConfig
from kwjax.distillation.mixup import Mixing, draw_mixing, mix

Array = jax.Array


class Plan(NamedTuple):
  """One batch as indices into the image set, over all devices.

  Attributes:
    chosen: i32[b].
    mixing: partners and weights, or None without mixup.
    keys: PRNG keys [b, 2] of the augmentation of image and partner, or None without augmentation.
  """

  chosen: np.ndarray
  mixing: Mixing | None
  keys: Array | None


def planner(key: Array, num_images: int, config: DistillConfig) -> Callable[[int], Plan]:
  """Step -> plan of its batch, a pure function of key and step.

  Each epoch is a permutation of the set drawn from `fold_in(key, epoch)`; batches follow one another through the
  epochs, so the one that meets the end of an epoch continues with the next and no image is dropped.

  Args:
    key: PRNG key of the run.
    num_images: size of the set.
    config: batch size, mixup, whether there is an augmentation.
  """
  order_key, mix_key, augment_key = (jax.random.fold_in(key, i) for i in range(3))
  count = config.batch_size

  @functools.lru_cache(maxsize=2)
  def order(epoch: int) -> np.ndarray:
    return np.asarray(jax.random.permutation(jax.random.fold_in(order_key, epoch), num_images), np.int32)

  def plan(step: int) -> Plan:
    positions = np.arange(step * count, (step + 1) * count)
    first, last = int(positions[0]) // num_images, int(positions[-1]) // num_images
    parts = [order(e)[positions[positions // num_images == e] % num_images] for e in range(first, last + 1)]
    return Plan(np.concatenate(parts), *_draw(mix_key, augment_key, step, num_images, config))

  return plan


@functools.partial(jax.jit, static_argnames=("num_images", "config"))
def _draw(
  mix_key: Array, augment_key: Array, step: Array | int, num_images: int, config: DistillConfig
) -> tuple[Mixing | None, Array | None]:
  mixing, keys = None, None
  if config.mixup is not None:
    mixing = draw_mixing(jax.random.fold_in(mix_key, step), config.batch_size, num_images, config.mixup)
  if config.augment is not None:
    keys = jax.random.split(jax.random.fold_in(augment_key, step), (config.batch_size, 2))
  return mixing, keys


def take(plan: Plan, rows: range) -> Plan:
  """The plan of some rows of a batch; rows beyond its end are copies of the last one, to be given no weight."""
  index = np.minimum(np.asarray(rows), len(plan.chosen) - 1)
  return Plan(*jax.tree.map(lambda leaf: leaf[index], (plan.chosen, plan.mixing, plan.keys)))


def gather(images: Any, plan: Plan) -> tuple[Any, Any]:
  """The batch's images and their partners (None without mixup), as they are stored, on the host or on a device."""
  return images[plan.chosen], None if plan.mixing is None else images[plan.mixing.partner]


def assemble(images: Array, partners: Array | None, plan: Plan, augment: Augment | None) -> Array:
  """What both networks see: images in [0,1], augmented each with its own key, then mixed; f32[b,h,w,c].

  Args:
    images: f32[b,h,w,c] in [0,1], or u8 in 0..255.
    partners: the same, or None without mixup.
    plan: weights and keys of these images.
    augment: applied to each image alone, so that its randomness does not depend on the batch around it.
  """

  def prepare(x: Array, side: int) -> Array:
    x = x.astype(jnp.float32) / 255.0 if x.dtype == jnp.uint8 else x.astype(jnp.float32)
    if augment is None or plan.keys is None:
      return x
    return jax.vmap(lambda key, image: augment(key, image[None])[0])(plan.keys[:, side], x)

  if partners is None or plan.mixing is None:
    return prepare(images, 0)
  return mix(prepare(images, 0), prepare(partners, 1), plan.mixing.lam)
