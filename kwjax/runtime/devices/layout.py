"""How the state of a run lies on its devices: a copy on each, or a row an image split over them."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from kwjax.runtime.devices import processes
from kwjax.runtime.devices.parallel import DeviceGroup

PyTree = Any


class Layout(Protocol):
  """Two functions that undo each other; what `fetch` returns does not depend on the number of devices."""

  @property
  def group(self) -> DeviceGroup:
    """The devices."""
    ...

  def place(self, tree: PyTree) -> PyTree:
    """Onto the devices, from how a checkpoint holds it."""
    ...

  def fetch(self, tree: PyTree) -> PyTree:
    """Back; every process of the run must make this call."""
    ...


@dataclasses.dataclass(frozen=True)
class Copies:
  """Every device holds the whole state: weights, their optimizer.

  Attributes:
    group: the devices.
  """

  group: DeviceGroup

  def place(self, tree: PyTree) -> PyTree:
    """A copy for each device."""
    return self.group.replicate(tree)

  def fetch(self, tree: PyTree) -> PyTree:
    """The copy of this process's first device."""
    return self.group.first(tree)


@dataclasses.dataclass(frozen=True)
class Rows:
  """Arrays hold a row an image, split over the devices; scalars are copied: pixels, their optimizer, labels.

  Attributes:
    group: the devices.
    size: rows of all devices. Where they do not divide, zeros fill up the last ones.
    is_whole: whether a process hands in and gets back all rows, or only its own.
  """

  group: DeviceGroup
  size: int
  is_whole: bool = False

  @property
  def own(self) -> range:
    """Rows that this process holds; none where there are fewer rows than devices."""
    held = self.group.rows(self.size)
    return range(min(held.start, self.size), min(held.stop, self.size))

  def place(self, tree: PyTree) -> PyTree:
    """Rows of this process, split over its devices."""
    missing = len(self.group.rows(self.size)) - len(self.own)

    def put(leaf: Any) -> jax.Array:
      if not np.ndim(leaf):
        return self.group.replicate(leaf)
      rows = leaf[self.own.start : self.own.stop] if self.is_whole else leaf
      padding = np.zeros((missing, *rows.shape[1:]), rows.dtype)
      return self.group.place(np.concatenate([rows, padding]) if missing else rows)

    return jax.tree.map(put, tree)

  def fetch(self, tree: PyTree) -> PyTree:
    """Rows without the padding, on the host."""
    scalar = 0 if self.group.size == 1 else 1

    def get(leaf: jax.Array) -> Any:
      if leaf.ndim == scalar:
        return np.asarray(self.group.first(leaf))
      rows = self.group.unshard(leaf)[: len(self.own)]
      return processes.gather(rows) if self.is_whole else rows

    return jax.tree.map(get, tree)
