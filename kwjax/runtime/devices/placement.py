"""Functions and arrays over several devices: every array has a leading axis with one entry per device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def is_local(device: jax.Device) -> bool:
  """Whether a device belongs to this process."""
  return device.process_index == jax.process_index()


def mesh(devices: Sequence[jax.Device], axis: str) -> Mesh:
  """A mesh with one axis."""
  return Mesh(np.asarray(devices), (axis,))


def mapped(function: Callable[..., Any], devices: Sequence[jax.Device], axis: str) -> Callable[..., Any]:
  """`function` on every device: all arguments and results have the leading axis, which the function does not see."""

  def on_one_device(*args: Any) -> Any:
    results = function(*jax.tree.map(lambda leaf: leaf[0], args))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], results)

  spread = PartitionSpec(axis)
  return jax.shard_map(on_one_device, mesh=mesh(devices, axis), in_specs=spread, out_specs=spread, check_vma=False)


def split(rows: Any, count: int) -> list[Any]:
  """`count` equal parts [1, b / count, ...] of rows [b, ...]."""
  each = rows.shape[0] // count
  return [rows[None, i * each : (i + 1) * each] for i in range(count)]


def join(
  parts: Sequence[Sequence[Any]], devices: Sequence[jax.Device], own: Sequence[jax.Device], axis: str
) -> list[jax.Array]:
  """Arrays [D, ...] over all devices from the parts of this process.

  No part passes through another device. A device gets all its parts in one transfer: one transfer per array of a network
  takes most of the time.

  Args:
    parts: for each of the own devices its part [1, ...] of every array.
    devices: all D devices.
    own: those of this process.
    axis: name of the axis over devices.
  """
  placed = [jax.device_put(list(of_device), device) for of_device, device in zip(parts, own, strict=True)]
  sharding = NamedSharding(mesh(devices, axis), PartitionSpec(axis))
  return [
    jax.make_array_from_single_device_arrays((len(devices), *rows[0].shape[1:]), sharding, list(rows))
    for rows in zip(*placed, strict=True)
  ]


def own_parts(array: jax.Array) -> list[jax.Array]:
  """The parts [1, ...] of an array [D, ...] on the devices of this process, in the order of the devices."""
  shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
  return [shard.data for shard in shards]
