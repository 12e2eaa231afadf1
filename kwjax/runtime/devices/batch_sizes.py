"""How many images a batch holds, and how a CPU computes one.

A CPU computes a batch of large images in parts, one after the other inside one call. The activations of a part fit into the
cache that its cores share, and the cost of a call is paid once for many parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from kwjax.network import Array
from kwjax.runtime.devices.parallel import DeviceGroup

_PART_PIXELS = 2 * 224 * 224  # of all images in a part, on one device
_PARTS = 16  # in a batch at most: 8 take 1 % longer, and a stop waits for all of them


def part_size(group: DeviceGroup, image_shape: Sequence[int]) -> int | None:
  """Images of (..., c) that a device computes at a time, at least 1. None on accelerators, which take what they are given."""
  if group.devices[0].platform != "cpu":
    return None
  return max(_PART_PIXELS // max(math.prod(image_shape[:-1]), 1), 1)


def forward_size(group: DeviceGroup, batch_size: int, count: int, image_shape: Sequence[int]) -> int:
  """Images in a batch over all devices: at most `batch_size` and as many as there are, a multiple of the devices, >= 1.

  CPUs take whole parts of large images, 9 to 16 per device where there are as many. Of these numbers the one is taken that
  leaves least padding.

  Args:
    group: the devices.
    batch_size: most images over all devices; rounded up to a multiple of them.
    count: images there are, which may be 0.
    image_shape: (h, w, c), or of features (..., c).
  """
  most = max(min(batch_size, count), 1)
  part = part_size(group, image_shape)
  if part is None or most <= part * group.size:
    return group.padded(most)
  wave = part * group.size
  waves = min(batch_size // wave, -(-count // wave), _PARTS)
  # Batches of almost the same size need different amounts of padding at the end.
  return wave * min(range(waves, waves // 2, -1), key=lambda n: n * -(-count // (n * wave)))


def even_edges(count: int, batch_size: int, *, multiple: int = 1) -> list[int]:
  """Where a set is cut: batch i goes from edge i to edge i + 1.

  Args:
    count: images in the set.
    batch_size: most images in a batch.
    multiple: the number of batches is a multiple of it, unless there are fewer images.
  """
  parts = math.ceil(math.ceil(count / batch_size) / multiple) * multiple
  parts = max(1, min(parts, count))
  return [count * i // parts for i in range(parts + 1)]


def in_parts(group: DeviceGroup, forward: Callable[..., Any], *arrays: Array) -> Any:
  """`forward(*arrays)`, on CPUs computed part by part; for functions that are compiled.

  Args:
    group: the devices that it is compiled for.
    forward: function of arrays with one row per image, images first, to a pytree of such arrays. A row of the result
      depends on the same row of the arrays alone.
    *arrays: f32[b,h,w,c] of one device, and what goes with each image.
  """
  count, part = arrays[0].shape[0], part_size(group, arrays[0].shape[1:])
  if part is None or count <= part:
    return forward(*arrays)
  size = next(n for n in range(part, 0, -1) if count % n == 0)
  parts = tuple(array.reshape(-1, size, *array.shape[1:]) for array in arrays)
  found = lax.map(lambda part: forward(*part), parts)
  return jax.tree.map(lambda rows: rows.reshape(count, *rows.shape[2:]), found)
