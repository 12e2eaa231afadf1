"""One step function for one device and for many: placement, `jax.pmap`, and differentiation under it.

The whole program differentiates through collectives in this file alone, because the rule differs with what the gradient is of:

- Under `jax.pmap` the transpose of `pmean` sums the cotangents of all devices. A loss made of pmeaned statistics is computed
  by each of D devices, so the gradient of a device's own images comes out D times too large; dividing the loss by D mends it.
- For weights that every device holds a copy of, each device's gradient is its share of the sum: averaging loss and gradients
  is right.

Adam is invariant to the scale of a gradient and hides the mistake; tests compare one-step gradients, not results.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kwjax.errors import KwjaxError

AXIS = "devices"

PyTree = Any
LossFn = Callable[..., tuple[jax.Array, PyTree]]


def mean(tree: PyTree, axis_name: str | None) -> PyTree:
  """Average a pytree over devices; the identity without an axis."""
  return tree if axis_name is None else lax.pmean(tree, axis_name)


def value_and_grad_of_shard(
  loss_fn: LossFn, axis_name: str | None
) -> Callable[..., tuple[tuple[jax.Array, PyTree], PyTree]]:
  """Gradient of a loss over all devices with respect to this device's own share of the data.

  Args:
    loss_fn: `(shard, *args) -> (loss f32[], aux)`; the loss is the same number on every device, made of averages over
      `axis_name`.
    axis_name: mapped axis, or None on one device.

  Returns:
    `(shard, *args) -> ((loss, aux), gradient like shard)`.
  """
  if axis_name is None:
    return jax.value_and_grad(loss_fn, has_aux=True)

  def share(shard: PyTree, *args: Any) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
    loss, aux = loss_fn(shard, *args)
    return loss / lax.axis_size(axis_name), (loss, aux)

  def value_and_grad(shard: PyTree, *args: Any) -> tuple[tuple[jax.Array, PyTree], PyTree]:
    (_, result), gradient = jax.value_and_grad(share, has_aux=True)(shard, *args)
    return result, gradient

  return value_and_grad


def value_and_grad_of_copy(
  loss_fn: LossFn, axis_name: str | None
) -> Callable[..., tuple[tuple[jax.Array, PyTree], PyTree]]:
  """Gradient of a loss over all devices with respect to weights that every device holds a copy of.

  Args:
    loss_fn: `(weights, *args) -> (loss f32[], aux)`; the loss is this device's own, or already an average.
    axis_name: mapped axis, or None on one device.

  Returns:
    `(weights, *args) -> ((loss, aux), gradient like weights)`, loss and gradient averaged over devices.
  """
  if axis_name is None:
    return jax.value_and_grad(loss_fn, has_aux=True)

  def averaged(weights: PyTree, *args: Any) -> tuple[jax.Array, PyTree]:
    loss, aux = loss_fn(weights, *args)
    return lax.pmean(loss, axis_name), aux

  def value_and_grad(weights: PyTree, *args: Any) -> tuple[tuple[jax.Array, PyTree], PyTree]:
    result, gradient = jax.value_and_grad(averaged, has_aux=True)(weights, *args)
    return result, lax.pmean(gradient, axis_name)

  return value_and_grad


@dataclasses.dataclass(frozen=True)
class DeviceGroup:
  """The devices a step runs on. Always: with more than one, every array carries a leading axis of one entry a device."""

  devices: tuple[jax.Device, ...]

  @property
  def size(self) -> int:
    """Number of devices."""
    return len(self.devices)

  @property
  def axis_name(self) -> str | None:
    """Axis over which steps average, None on one device."""
    return AXIS if self.size > 1 else None

  def compile(self, step: Callable[..., Any], *, donate: Sequence[int] = ()) -> Callable[..., Any]:
    """`step(*args, axis_name)` jitted on one device or pmapped over several.

    Args:
      step: pure function; all outputs are per device (a replicated one is equal on each).
      donate: positions of arguments whose buffers the outputs may reuse.
    """
    mapped = functools.partial(step, axis_name=self.axis_name)
    if self.size == 1:
      return jax.jit(mapped, donate_argnums=tuple(donate))
    return jax.pmap(mapped, axis_name=AXIS, devices=list(self.devices), donate_argnums=tuple(donate))

  def shard(self, tree: PyTree) -> PyTree:
    """Split the leading axis over the devices: [b, ...] -> [D, b / D, ...].

    Raises:
      KwjaxError: the leading axis is not a multiple of the number of devices.
    """
    if self.size == 1:
      return jax.device_put(tree, self.devices[0])

    def split(leaf: Any) -> jax.Array:
      if leaf.shape[0] % self.size:
        raise KwjaxError(f"a batch of {leaf.shape[0]} does not divide over {self.size} devices")
      return jax.device_put(leaf.reshape(self.size, -1, *leaf.shape[1:]), self._sharding())

    return jax.tree.map(split, tree)

  def replicate(self, tree: PyTree) -> PyTree:
    """Give each device a copy: [...] -> [D, ...]."""
    if self.size == 1:
      return jax.device_put(tree, self.devices[0])
    return jax.tree.map(lambda leaf: jax.device_put(jnp.stack([leaf] * self.size), self._sharding()), tree)

  def unshard(self, tree: PyTree) -> PyTree:
    """Undo `shard`: [D, b / D, ...] -> [b, ...] on the host."""
    if self.size == 1:
      return jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), tree)

  def first(self, tree: PyTree) -> PyTree:
    """Undo `replicate`: the first device's copy."""
    return tree if self.size == 1 else jax.tree.map(lambda leaf: leaf[0], tree)

  def _sharding(self) -> NamedSharding:
    return NamedSharding(Mesh(np.asarray(self.devices), (AXIS,)), PartitionSpec(AXIS))


def device_group(devices: int | Sequence[jax.Device] | DeviceGroup | None = None) -> DeviceGroup:
  """The devices to run on.

  Args:
    devices: a number of local devices, the devices themselves, or None: all local accelerators, or one CPU.

  Raises:
    KwjaxError: more devices are asked for than there are.
  """
  if isinstance(devices, DeviceGroup):
    return devices
  local = jax.local_devices()
  if devices is None:
    return DeviceGroup(tuple(local) if local[0].platform != "cpu" else (local[0],))
  if not isinstance(devices, int):
    return DeviceGroup(tuple(devices))
  if not 1 <= devices <= len(local):
    hint = ""
    if local[0].platform == "cpu":
      hint = f"; for CPU devices set XLA_FLAGS=--xla_force_host_platform_device_count={max(devices, 1)} first"
    raise KwjaxError(f"{devices} devices were asked for, {len(local)} {local[0].platform} device(s) are here{hint}")
  return DeviceGroup(tuple(local[:devices]))


def axis_offset(local_size: int, axis_name: str | None) -> jax.Array | int:
  """Index in the whole batch of this device's first example, so that randomness does not depend on the number of devices."""
  return 0 if axis_name is None else lax.axis_index(axis_name) * local_size
