"""Forward a set of images batch by batch over devices and processes, for whatever is wanted of them.

A batch is what one call of a compiled function takes. CPUs compute a large one in parts, one after the other inside that call:
the activations of a part stay in the cache that cores share, and what a call costs is paid for many of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from tqdm.auto import tqdm

from kwjax.errors import Interrupted
from kwjax.network import Array
from kwjax.runtime import processes
from kwjax.runtime.data import pad_batch
from kwjax.runtime.parallel import DeviceGroup

_PART_PIXELS = 2 * 224 * 224  # of all images in a part, on one device
_PARTS = 16  # in a batch at most: 8 take 1 % longer, and a stop waits for all of them


def part_size(group: DeviceGroup, image_shape: Sequence[int]) -> int | None:
  """Images of (h, w, c) that a device computes at a time, >= 1; None: as many as it is given, which accelerators do."""
  if group.devices[0].platform != "cpu":
    return None
  return max(_PART_PIXELS // (image_shape[0] * image_shape[1]), 1)


def forward_size(group: DeviceGroup, batch_size: int, count: int, image_shape: Sequence[int]) -> int:
  """Images in a batch over all devices: at most `batch_size` and as many as there are, a multiple of the devices, >= 1.

  CPUs take whole parts of large images, 9 to 16 a device where there are as many, by how many fill the last batch best.

  Args:
    group: the devices.
    batch_size: most images over all devices; rounded up to a multiple of them.
    count: images there are, which may be 0.
    image_shape: (h, w, c).
  """
  most = max(min(batch_size, count), 1)
  part = part_size(group, image_shape)
  if part is None or most <= part * group.size:
    return group.padded(most)
  wave = part * group.size
  waves = min(batch_size // wave, -(-count // wave), _PARTS)
  # The last batch is filled up, and of batches of almost the same size some leave less to fill.
  return wave * min(range(waves, waves // 2, -1), key=lambda n: n * -(-count // (n * wave)))


def in_parts(group: DeviceGroup, forward: Callable[[Array], Any], images: Array) -> Any:
  """`forward(images)`, on CPUs computed part by part; for functions that are compiled.

  Args:
    group: the devices that it is compiled for.
    forward: `f32[b,h,w,c] -> pytree of arrays with one row an image`, each of which depends on that image alone.
    images: f32[b,h,w,c] of one device.
  """
  count, part = images.shape[0], part_size(group, images.shape[1:])
  if part is None or count <= part:
    return forward(images)
  size = next(n for n in range(part, 0, -1) if count % n == 0)
  found = lax.map(forward, images.reshape(-1, size, *images.shape[1:]))
  return jax.tree.map(lambda rows: rows.reshape(count, *rows.shape[2:]), found)


def forward_batches(
  forward: Callable[[Any, Any], Any],
  placed: Any,
  images: Array | np.ndarray,
  group: DeviceGroup,
  *,
  batch_size: int,
  words: str,
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Any, np.ndarray]]:
  """`(what forward gave of a batch, bool[rows] that are images and no filling)` for this process's share of the images.

  Every batch has the same shape; a process without images forwards one batch of filling.

  Args:
    forward: compiled by the group, `(placed, images) -> pytree of arrays with one row an image`.
    placed: its first argument, on the devices.
    images: f32[n,h,w,c] in [0,1].
    group: devices of this process.
    batch_size: images at a time at most, see `forward_size`.
    words: what the bar says.
    progress: show a bar.
    should_stop: asked each time a batch is under way; what was forwarded until then is handed over.

  Raises:
    Interrupted: `should_stop` said so, in any process.
  """
  own = processes.share(len(images))
  size = forward_size(group, batch_size, len(own), images.shape[1:])
  starts: Sequence[int] = range(own.start, max(own.stop, own.start + 1), size)
  stopped, under_way = False, None
  for start in tqdm(starts, desc=words, unit="batch", disable=not (progress and processes.is_main())):
    batch, _, valid = pad_batch(np.asarray(images[start : min(start + size, own.stop)]), None, size)
    # A thousandth, as TF32 rounds, would move what is observed; Winograd's form on CPUs, a hundred thousandth, does not.
    with jax.default_matmul_precision("highest"):
      found = forward(placed, group.shard(batch))
    if under_way is not None:
      # While the host takes in the batch before, the devices have this one to work on.
      yield group.unshard(under_way[0]), under_way[1]
    under_way = found, valid
    stopped = processes.stop_is_known(should_stop())
    if stopped:
      break
  if under_way is not None:
    yield group.unshard(under_way[0]), under_way[1]
  if processes.any_stop(stopped):
    raise Interrupted("stopped while forwarding images")
