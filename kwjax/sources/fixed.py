"""A set of images that is there already, synthetic or not, on the devices or on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.errors import DataError, KwjaxError
from kwjax.intercept import Forwardable
from kwjax.network import Array
from kwjax.runtime.devices import parallel
from kwjax.sources.base import Batch, Feed, Source
from kwjax.sources.mixup import Mixup
from kwjax.sources.plan import Augment, Plan, gather, mixed, planner, random_plan, take


class _Rows(NamedTuple):
  """Rows of a batch: their plan, and where the set is on the host, what it says to take."""

  plan: Plan
  images: tuple[Any, Any] | None
  targets: tuple[Any, Any] | None


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class FixedSet(Source[tuple[()]]):
  """Images that are there already; in a run each epoch sees each of them once, in an order of its own.

  Attributes:
    images: f32[n,h,w,c] in [0,1], or u8[n,h,w,c] in 0..255.
    targets: soft labels f32[n,k]; or classes i[n], of which -1 is none; or None.
    num_classes: k, where targets are classes.
    augment: applied to each image alone, before mixing, or None.
    mixup: how images and their targets are mixed, or None.
    resident_bytes: sets up to this size are held on the devices (the sum of their copies), larger ones on the host.
    is_resident: whether the devices hold the set; `on_devices` decides it.
  """

  images: Array | np.ndarray
  targets: Array | np.ndarray | None = None
  _: dataclasses.KW_ONLY
  num_classes: int | None = None
  augment: Augment | None = None
  mixup: Mixup | None = None
  resident_bytes: int = 2 << 30
  is_resident: bool = True

  def __post_init__(self) -> None:
    if self.images.ndim != 4:
      raise KwjaxError(f"images have shape (n, h, w, c), found {tuple(self.images.shape)}")
    if self.targets is None:
      return
    if len(self.targets) != len(self.images):
      raise DataError(f"{len(self.images)} images have {len(self.targets)} targets")
    if self.targets.ndim == 1 and self.num_classes is None:
      raise KwjaxError("targets that are classes need num_classes")

  def tree_flatten(self) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
    """Children: images and targets, where the devices hold them."""
    children = (self.images, self.targets) if self.is_resident else (None, None)
    return children, (self.num_classes, self.augment, self.mixup, self.resident_bytes, self.is_resident)

  @classmethod
  def tree_unflatten(cls, static: tuple[Any, ...], children: tuple[Any, Any]) -> FixedSet:
    """Rebuild without validation: JAX also unflattens with placeholders for leaves."""
    made = object.__new__(cls)
    names = ("num_classes", "augment", "mixup", "resident_bytes", "is_resident")
    for name, value in (*zip(("images", "targets"), children, strict=True), *zip(names, static, strict=True)):
      object.__setattr__(made, name, value)
    return made

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(h, w, c)."""
    height, width, channels = self.images.shape[1:]
    return (height, width, channels)

  def init(self, key: Array) -> tuple[()]:
    """No state: which images a step sees is a function of the run's PRNG key and the step."""
    del key
    return ()

  def draw(self, state: tuple[()], key: Array, n: int, axis_name: str | None = None) -> Batch:
    """Images drawn at random, each independently of the others; a run takes `feed`, whose epochs are permutations.

    Args:
      state: none.
      key: PRNG key.
      n: images over all devices.
      axis_name: mapped axis of the devices.
    """
    del state
    plan = random_plan(key, len(self.images), n, mixup=self.mixup, augments=self.augment is not None)
    return self.assemble(_Rows(take(plan, parallel.batch_rows(n, axis_name)), None, None))

  def feed(self, key: Array, n: int, rows: np.ndarray) -> Feed:
    """Step -> plan of its batch, and the images themselves where the host holds them.

    Args:
      key: PRNG key of the run.
      n: images of a batch.
      rows: i32[m], rows of the batch that this process holds.
    """
    plan = planner(key, len(self.images), n, mixup=self.mixup, augments=self.augment is not None)
    is_whole = len(rows) == n

    def rows_of(step: int) -> _Rows:
      own = plan(step) if is_whole else take(plan(step), rows)
      if self.is_resident:
        return _Rows(own, None, None)
      return _Rows(own, gather(self.images, own), None if self.targets is None else gather(self.targets, own))

    return rows_of

  def assemble(self, rows: _Rows) -> Batch:
    """What both networks see: images in [0,1], augmented each with its own key, then mixed with their partners."""
    plan = rows.plan
    images = gather(self.images, plan) if rows.images is None else rows.images
    pair = rows.targets if self.targets is None else gather(self.targets, plan)
    targets = None
    if pair is not None:
      targets = mixed(self._soft(pair[0]), None if pair[1] is None else self._soft(pair[1]), plan)
    return Batch(assemble(*images, plan, self.augment), targets)

  def _soft(self, targets: Array) -> Array:
    if targets.ndim > 1:
      return targets
    assert self.num_classes is not None
    return jax.nn.one_hot(targets, self.num_classes)

  def on_devices(self, count: int) -> FixedSet:
    """The set as `count` devices hold it, or, where their copies are too large together, on the host."""
    if self.images.nbytes * count <= self.resident_bytes:
      return dataclasses.replace(self, is_resident=True)
    targets = None if self.targets is None else np.asarray(self.targets)
    return dataclasses.replace(self, images=np.asarray(self.images), targets=targets, is_resident=False)

  def to_json(self) -> dict[str, Any]:
    """What the batches depend on, whether or not the devices hold the set."""
    settings = super().to_json()
    return {name: value for name, value in settings.items() if name not in ("resident_bytes", "is_resident")}


def assemble(images: Array, partners: Array | None, plan: Plan, augment: Augment | None) -> Array:
  """Images in [0,1], augmented each with its own key, then mixed; f32[b,h,w,c].

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

  return mixed(prepare(images, 0), None if partners is None else prepare(partners, 1), plan)


def check_images(images: Array | np.ndarray, networks: Iterable[Forwardable], *, beyond: float = 0.0) -> None:
  """Refuses a set that cannot be trained on, before anything is computed.

  Args:
    images: f32 in [0,1] or u8, of any shape.
    networks: that will see them.
    beyond: by how much f32 values may exceed [0,1].

  Raises:
    KwjaxError: the images do not have the shape (n, *image_shape) of a network.
    DataError: there are none, or their values lie outside the range.
  """
  shape = tuple(images.shape)
  for network in networks:
    if len(shape) != 4 or shape[1:] != tuple(network.image_shape):
      raise KwjaxError(
        f"images of {network.name} have shape (n, {', '.join(map(str, network.image_shape))}), found {shape}"
      )
  if shape[0] == 0:
    raise DataError("there are no images to train on")
  if images.dtype == np.uint8:
    return
  low, high = float(images.min()), float(images.max())
  if not (low >= -beyond and high <= 1.0 + beyond):
    noise = f" (noise may exceed it by {beyond:g})" if beyond else ""
    raise DataError(f"images must be in units of [0, 1]{noise} or uint8, found values from {low:.4g} to {high:.4g}")
