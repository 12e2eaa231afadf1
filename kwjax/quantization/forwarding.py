"""Forward a set of images batch by batch over devices and processes, for whatever is observed of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from kwjax.errors import Interrupted
from kwjax.network import Array
from kwjax.runtime import processes
from kwjax.runtime.data import pad_batch
from kwjax.runtime.parallel import DeviceGroup


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
    batch_size: images at a time at most, see `DeviceGroup.forward_size`.
    words: what the bar says.
    progress: show a bar.
    should_stop: asked each time a batch is under way; what was forwarded until then is handed over.

  Raises:
    Interrupted: `should_stop` said so, in any process.
  """
  own = processes.share(len(images))
  size = group.forward_size(batch_size, len(own), images.shape[1:])
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
    raise Interrupted("stopped while observing activation ranges")
