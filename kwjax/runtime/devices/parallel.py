"""One step function for one device and for many: placement, mapping over devices, and gradients over them.

All gradients that pass through collectives are taken in this file, because the rule differs with what they are of:

- Images: every device computes the same loss from averages over all devices. Under the map the transpose of `pmean` sums
  the cotangents of all D devices, so the gradient of a device's own images comes out D times too large. Dividing the loss
  by D corrects that.
- Weights that every device has a copy of: the gradient of each device is its share of the sum. Averaging loss and
  gradients over devices is right.

Adam is invariant to the scale of a gradient and hides a mistake here, so tests compare the gradients of one step.

Steps are mapped by `jax.shard_map` without its check of replication. `jax.pmap` does the same, but copies donated arguments
in a run of several processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kwjax.errors import KwjaxError
from kwjax.kernels.processor import compiler_options
from kwjax.runtime.devices import placement
from kwjax.runtime.devices.packing import pack_constants, unpacked

AXIS = "devices"

PyTree = Any
LossFn = Callable[..., tuple[jax.Array, PyTree]]


def mean(tree: PyTree, axis_name: str | None, share: jax.Array | None = None) -> PyTree:
  """Average a pytree over devices; the identity without an axis.

  Args:
    tree: this device's averages over its own images.
    axis_name: mapped axis, or None on one device.
    share: f32[], of `weight_share`, where the images of the devices have weights; None: every device counts the same.
  """
  if axis_name is None:
    return tree
  if share is None:
    return lax.pmean(tree, axis_name)
  return lax.psum(jax.tree.map(lambda leaf: share * leaf, tree), axis_name)


def weight_share(weights: jax.Array | None, axis_name: str | None) -> jax.Array | None:
  """Share f32[] of all images' weight that lies on this device: sum(w) here / sum(w) over all devices; None without weights.

  Args:
    weights: f32[b] of this device's images, 1 for one that counts and 0 for padding, or None.
    axis_name: mapped axis, or None on one device.
  """
  if weights is None or axis_name is None:
    return None
  here = jnp.sum(weights)
  everywhere = lax.psum(here, axis_name)
  return here / jnp.where(everywhere > 0.0, everywhere, 1.0)


def weighted_mean(values: jax.Array, weights: jax.Array | None) -> jax.Array:
  """sum_i w_i mean(values_i) / sum_i w_i over this device's images; f32[], zero where all weights are.

  Args:
    values: [b, ...], finite also where the weight is zero.
    weights: f32[b], or None: the plain mean.
  """
  if weights is None:
    return jnp.mean(values)
  by_image = jnp.mean(jnp.asarray(values, jnp.float32), tuple(range(1, values.ndim)))
  total = jnp.sum(weights)
  return jnp.sum(weights * by_image) / jnp.where(total > 0.0, total, 1.0)


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
  """The devices that a step runs on, grouped by process and in the order of the processes.

  With more than one device, every placed array has a leading axis with one entry per device. A process hands in and gets
  back its own entries only, which are its rows of a batch.
  """

  devices: tuple[jax.Device, ...]

  @property
  def size(self) -> int:
    """Number of devices, of all processes."""
    return len(self.devices)

  @property
  def axis_name(self) -> str | None:
    """Axis over which steps average; None on one device."""
    return AXIS if self.size > 1 else None

  @property
  def local(self) -> DeviceGroup:
    """The devices of this process, for work that needs no other process."""
    return self if self._spans_one_process else DeviceGroup(tuple(self._own))

  @property
  def _spans_one_process(self) -> bool:
    return len(self._own) == self.size

  @property
  def _own(self) -> list[jax.Device]:
    return [device for device in self.devices if placement.is_local(device)]

  def compile(self, step: Callable[..., Any], *, donate: Sequence[int] = ()) -> Callable[..., Any]:
    """`step(*args, axis_name)`, jitted on one device or mapped over several.

    Args:
      step: pure function. All outputs are per device; a replicated one is equal on each.
      donate: positions of arguments whose buffers the outputs may reuse.
    """

    def mapped(*args: Any) -> Any:
      return step(*unpacked(args), axis_name=self.axis_name)

    options = compiler_options() if self.devices[0].platform == "cpu" else None
    if self.size == 1:
      return jax.jit(mapped, donate_argnums=tuple(donate), compiler_options=options)

    over_devices = placement.mapped(mapped, self.devices, AXIS)
    return jax.jit(over_devices, donate_argnums=tuple(donate), compiler_options=options)

  def padded(self, size: int) -> int:
    """The smallest multiple of the number of devices that holds a batch of `size`."""
    return -(-size // self.size) * self.size

  def rows(self, size: int) -> range:
    """The rows that this process holds of a batch of `size`, padded to a multiple of the number of devices."""
    each = self.padded(size) // self.size
    own = [i for i, device in enumerate(self.devices) if placement.is_local(device)]
    return range(own[0] * each, (own[-1] + 1) * each)

  def place(self, tree: PyTree) -> PyTree:
    """Put the rows of this process onto its devices: [rows, ...] -> [D, b / D, ...], or unchanged on one device.

    Raises:
      KwjaxError: they do not divide over the devices.
    """
    if self.size == 1:
      return jax.device_put(tree, self.devices[0])
    leaves, structure = jax.tree.flatten(tree)
    own = len(self._own)
    for leaf in leaves:
      _check_divides(leaf.shape[0], own)
    split = [placement.split(leaf, own) for leaf in leaves]
    return jax.tree.unflatten(structure, self._joined([[parts[i] for parts in split] for i in range(own)]))

  def shard(self, tree: PyTree) -> PyTree:
    """Split the leading axis of a batch that each process holds as a whole: [b, ...] -> [D, b / D, ...].

    Raises:
      KwjaxError: the leading axis is not a multiple of the number of devices.
    """
    if self._spans_one_process:
      return self.place(tree)

    def own(leaf: Any) -> Any:
      _check_divides(leaf.shape[0], self.size)
      rows = self.rows(leaf.shape[0])
      return leaf[rows.start : rows.stop]

    return self.place(jax.tree.map(own, tree))

  def replicate(self, tree: PyTree) -> PyTree:
    """Give each device a copy: [...] -> [D, ...]."""
    if self.size == 1:
      return jax.device_put(tree, self.devices[0])
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, self._joined([[leaf[None] for leaf in leaves]] * len(self._own)))

  def replicate_constants(self, tree: PyTree) -> PyTree:
    """As `replicate`, for what steps only read, such as a network. CPUs get it packed, see `pack_constants`."""
    return self.replicate(pack_constants(tree) if self.devices[0].platform == "cpu" else tree)

  def by_device(self, tree: PyTree) -> PyTree:
    """What each device of this process holds, on the host: [d, ...], also on one device."""
    if self.size == 1:
      return jax.tree.map(lambda leaf: np.asarray(leaf)[None], tree)
    return jax.tree.map(lambda leaf: np.concatenate([np.asarray(part) for part in placement.own_parts(leaf)]), tree)

  def unshard(self, tree: PyTree) -> PyTree:
    """Undo `place`: [D, b / D, ...] -> [rows, ...] on the host, the rows of this process."""
    if self.size == 1:
      return jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda leaf: np.concatenate([np.asarray(part)[0] for part in placement.own_parts(leaf)]), tree)

  def first(self, tree: PyTree) -> PyTree:
    """Undo `replicate`: the copy on the first device of this process."""
    return tree if self.size == 1 else jax.tree.map(lambda leaf: placement.own_parts(leaf)[0][0], tree)

  def _joined(self, parts: Sequence[Sequence[Any]]) -> list[jax.Array]:
    return placement.join(parts, self.devices, self._own, AXIS)


def _check_divides(rows: int, devices: int) -> None:
  if rows % devices:
    raise KwjaxError(f"a batch of {rows} does not divide over {devices} devices")


Devices = int | Sequence[jax.Device] | DeviceGroup | None
"""What functions take as `devices`; `device_group` turns it into a `DeviceGroup`."""


def device_group(devices: Devices = None) -> DeviceGroup:
  """The devices to run on.

  Args:
    devices: number of devices per process, the devices themselves, or a group. None: all accelerators, or one CPU per
      process.

  Raises:
    KwjaxError: there are fewer devices than asked for, or none of them belongs to this process.
  """
  if isinstance(devices, DeviceGroup):
    return devices
  if devices is not None and not isinstance(devices, int):
    group = DeviceGroup(tuple(sorted(devices, key=lambda device: device.process_index)))
    if not group._own:
      raise KwjaxError(f"none of the {group.size} devices belongs to this process")
    return group
  by_process = [
    [device for device in jax.devices() if device.process_index == index] for index in range(jax.process_count())
  ]
  local = by_process[jax.process_index()]
  is_cpu = local[0].platform == "cpu"
  wanted = devices if devices is not None else 1 if is_cpu else max(map(len, by_process))
  # The process with the fewest devices decides, so that all processes refuse.
  fewest = min(map(len, by_process))
  if devices is not None and not 1 <= devices <= fewest:
    hint = ""
    if is_cpu:
      hint = f"; for CPU devices set XLA_FLAGS=--xla_force_host_platform_device_count={max(devices, 1)} first"
    raise KwjaxError(f"{devices} devices were asked for, {fewest} {local[0].platform} device(s) are here{hint}")
  return DeviceGroup(tuple(device for own in by_process for device in own[:wanted]))


def axis_offset(local_size: int, axis_name: str | None) -> jax.Array | int:
  """Index in the whole batch of this device's first example, so that randomness does not depend on the number of devices."""
  return 0 if axis_name is None else lax.axis_index(axis_name) * local_size


def batch_rows(size: int, axis_name: str | None) -> jax.Array:
  """Which rows of a batch of `size` this device holds, i32[ceil(size / D)]; padding repeats the last row."""
  each = size if axis_name is None else -(-size // lax.axis_size(axis_name))
  return jnp.minimum(axis_offset(each, axis_name) + jnp.arange(each), size - 1)


def padding_weights(size: int, axis_name: str | None) -> jax.Array | None:
  """f32[ceil(size / D)] of this device's rows of a batch of `size`: 1 for an image, 0 for padding; None without padding."""
  if axis_name is None or size % lax.axis_size(axis_name) == 0:
    return None
  each = -(-size // lax.axis_size(axis_name))
  return (axis_offset(each, axis_name) + jnp.arange(each) < size).astype(jnp.float32)
