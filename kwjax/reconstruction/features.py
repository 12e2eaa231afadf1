"""Inputs and outputs of a unit for all images, computed once: on the devices, on the host or in a file."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.network import Array
from kwjax.reconstruction.step import Rows, channel_error
from kwjax.reconstruction.units import Part
from kwjax.runtime.devices import memory, processes
from kwjax.runtime.devices.forwarding import forward_rows
from kwjax.runtime.devices.parallel import DeviceGroup

_SETS = 3  # of features at a time: two inputs and the target


class Shelf:
  """Where features lie that no longer fit into the memory of the host: files that vanish with the run."""

  def __init__(self, folder: pathlib.Path, host_bytes: int) -> None:
    self._folder, self._host_bytes, self._count = folder, host_bytes, 0

  def array(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An empty array in memory, or of a file where `_SETS` of them are too large."""
    if int(np.prod(shape)) * np.dtype(dtype).itemsize * _SETS <= self._host_bytes:
      return np.empty(shape, dtype)
    self._count += 1
    return np.lib.format.open_memmap(self._folder / f"{self._count}.npy", "w+", np.dtype(dtype), tuple(shape))

  def drop(self, array: np.ndarray) -> None:
    """Removes the file of an array that is needed no more."""
    if isinstance(array, np.memmap) and array.filename is not None:
      pathlib.Path(array.filename).unlink(missing_ok=True)


@contextlib.contextmanager
def open_shelf(workdir: str | pathlib.Path | None, host_bytes: int | None) -> Iterator[Shelf]:
  """A shelf in the run's folder or, without one, in the folder for temporary files.

  Args:
    workdir: of the run, or None.
    host_bytes: most bytes of features in memory; None: half of what is left.
  """
  limit = host_bytes if host_bytes is not None else (memory.available_on_host() or 1 << 62) // 2
  with tempfile.TemporaryDirectory(prefix="features-", dir=workdir, ignore_cleanup_errors=True) as folder:
    yield Shelf(pathlib.Path(folder), limit)


class Forwarded(NamedTuple):
  """What a unit gives for all inputs, in every process.

  Attributes:
    outputs: [n, ...].
    error: mean of `channel_error` over all images; 0 where there is nothing to compare with.
  """

  outputs: np.ndarray
  error: float


def _outputs(constants: tuple[Sequence[Array], Array | None], x: Array, *wanted: Array, part: Part) -> Any:
  leaves, channels = constants
  found = part(leaves, x)
  if not wanted or channels is None:
    return found, jnp.zeros(len(found))
  return found, channel_error(found, wanted[0], channels)


def forward(
  part: Part,
  leaves: Sequence[Any],
  x: np.ndarray,
  wanted: np.ndarray | None,
  channels: Array | None,
  *,
  batch_size: int,
  group: DeviceGroup,
  shelf: Shelf,
  should_stop: Callable[[], bool],
) -> Forwarded:
  """Forwards all images through a unit.

  Args:
    part: program of the unit.
    leaves: its variables.
    x: inputs [n, ...].
    wanted: outputs to compare with, or None.
    channels: weights of the channels in the error, or None.
    batch_size: images at a time.
    group: devices.
    shelf: gives the memory.
    should_stop: asked between batches.
  """
  own = processes.share(len(x))
  held: np.ndarray | None = None
  errors, done = [], 0
  with jax.default_matmul_precision("highest"):
    batches = forward_rows(
      _outputs,
      (list(leaves), channels),
      x,
      *(() if wanted is None else (wanted,)),
      batch_size=batch_size,
      description=part.name,
      devices=group,
      should_stop=should_stop,
      options={"part": part},
    )
    for rows, error in batches:
      if held is None:
        held = shelf.array((len(own), *rows.shape[1:]), rows.dtype)
      held[done : done + len(rows)] = rows
      done += len(rows)
      errors.append(error)
  assert held is not None
  outputs = held if processes.count() == 1 else processes.gather(held)
  return Forwarded(outputs, float(np.mean(processes.gather(np.concatenate(errors)), dtype=np.float64)))


def placed(features: Rows, group: DeviceGroup, resident_bytes: int) -> Rows | None:
  """The features on the devices, or None where their copies are too large together."""
  total = sum(array.nbytes for array in features) * group.size
  return group.replicate(jax.tree.map(jnp.asarray, features)) if total <= resident_bytes else None
