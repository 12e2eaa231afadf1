"""Which images make a batch: drawn over all devices at once, so that neither their number nor a restart matters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.distillation.config import Augment
from kwjax.distillation.mixup import Mixing, Mixup, draw_mixing, mix
from kwjax.runtime.parallel import DeviceGroup

Array = jax.Array


class Drawing(Protocol):
  """What decides how batches are drawn; hashable."""

  @property
  def batch_size(self) -> int:
    """Images a batch, over all devices."""
    ...

  @property
  def mixup(self) -> Mixup | None:
    """How images are mixed, or None."""
    ...

  @property
  def augment(self) -> Augment | None:
    """What is applied to each image, or None."""
    ...


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


def planner(key: Array, num_images: int, config: Drawing) -> Callable[[int], Plan]:
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
  mix_key: Array, augment_key: Array, step: Array | int, num_images: int, config: Drawing
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


@dataclasses.dataclass(frozen=True)
class Feed:
  """The batches of a run on its devices.

  Attributes:
    group: the devices.
    plan: step -> plan of its batch.
    source: all images: a copy on each device, or on the host.
    rows: which rows of a batch this process holds.
    weights: of these rows on the devices, or None where batches divide over the devices.
    is_resident: whether the images are on the devices.
  """

  group: DeviceGroup
  plan: Callable[[int], Plan]
  source: Any
  rows: range
  weights: Any
  is_resident: bool

  @classmethod
  def of(
    cls, images: Any, plan: Callable[[int], Plan], batch_size: int, group: DeviceGroup, resident_bytes: int
  ) -> Feed:
    """Places the images: on the devices if all copies together take at most `resident_bytes`, else on the host."""
    rows, weights = group.rows(batch_size), group.weights(batch_size)
    is_resident = images.nbytes * group.size <= resident_bytes
    source = group.replicate(images) if is_resident else np.asarray(images)
    return cls(group, plan, source, rows, None if weights is None else group.place(weights), is_resident)

  def batch(self, step: int) -> tuple[Any, Plan]:
    """What a step is given, the whole source or `gather`'s batch, and the plan of this process's rows, on the host."""
    plan = self.plan(step)
    plan = plan if self.weights is None and self.group.local == self.group else take(plan, self.rows)
    return self.source if self.is_resident else self.group.place(gather(self.source, plan)), plan


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


@functools.lru_cache(maxsize=8)
def compiled_step(
  group: DeviceGroup, step: Callable[..., Any], config: Drawing, is_resident: bool
) -> Callable[..., Any]:
  """`(state, source, plan, given, weights) -> step(state, batch, given, config, weights)` on the devices; compiled once.

  Args:
    group: the devices.
    step: `(state, batch, given, config, weights, *, axis_name)`, pure; `given` is what it needs beside the images.
    config: of the run; says how images are augmented.
    is_resident: of the `Feed`: whether `source` is all images, or the batch.
  """

  def on_batch(state: Any, source: Any, plan: Plan, given: Any, weights: Any, axis_name: str | None) -> Any:
    images, partners = gather(source, plan) if is_resident else source
    batch = assemble(images, partners, plan, config.augment)
    return step(state, batch, given, config, weights, axis_name=axis_name)

  return group.compile(on_batch, donate=(0,))
