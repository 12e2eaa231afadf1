"""Many small arrays as a few large ones, as each transfer, call or result has a cost for each array."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

_SMALL = 32 * 1024  # bytes; copying a smaller array inside a program costs almost nothing


class _Slot(NamedTuple):
  """Place of a leaf: its array, its first element, and its shape after the leading axes."""

  array: int
  start: int | None  # None: the leaf is the whole array
  shape: tuple[int, ...]


@jax.tree_util.register_pytree_node_class
class Packed:
  """A pytree with some leaves concatenated into one array for each type; itself a pytree of those arrays.

  Leading axes of its arrays, such as one of devices, can be added or removed: `unpack` counts axes from the end.
  """

  def __init__(self, arrays: list[Any], structure: Hashable, slots: tuple[_Slot, ...]) -> None:
    self.arrays, self._structure, self._slots = arrays, structure, slots

  def tree_flatten(self) -> tuple[list[Any], tuple[int, Hashable, tuple[_Slot, ...]]]:
    """Children: the arrays."""
    # jaxlib 0.10 takes the structures of two dataclasses with the same fields as equal, and would confuse two networks;
    # their hashes differ.
    return self.arrays, (hash(self._structure), self._structure, self._slots)

  @classmethod
  def tree_unflatten(cls, static: tuple[int, Hashable, tuple[_Slot, ...]], arrays: Any) -> Self:
    """Rebuild without validation: JAX also unflattens with placeholders."""
    return cls(list(arrays), *static[1:])

  def unpack(self) -> PyTree:
    """The pytree: views of NumPy arrays, slices of others."""
    return jax.tree.unflatten(self._structure, [self._leaf(slot) for slot in self._slots])

  def _leaf(self, slot: _Slot) -> Any:
    array = self.arrays[slot.array]
    if slot.start is None:
      return array
    part = array[..., slot.start : slot.start + math.prod(slot.shape)]
    return part.reshape((*part.shape[:-1], *slot.shape))


def pack_rows(tree: PyTree) -> Packed:
  """All leaves [b, ...] of a pytree as one array [b, k] for each type, for the result of a program."""
  leaves, structure = jax.tree.flatten(tree)
  return _pack(leaves, structure, range(len(leaves)), 1, jnp.concatenate)


def pack_constants(tree: PyTree) -> Packed:
  """The small arrays of a pytree on the host as one array for each type; other leaves stay unchanged.

  Most arrays of a network are small vectors of its BatchNorm layers, and copying each to each device takes longer.
  """
  leaves, structure = jax.tree.flatten(tree)
  return _pack(leaves, structure, [i for i, leaf in enumerate(leaves) if _is_small(leaf)], 0, np.concatenate)


def unpacked(tree: PyTree) -> PyTree:
  """A pytree with every `Packed` in it replaced by its content."""
  return jax.tree.map(lambda node: node.unpack() if _is_packed(node) else node, tree, is_leaf=_is_packed)


def _pack(
  leaves: Sequence[Any], structure: Hashable, chosen: Sequence[int], lead: int, concatenate: Callable[..., Any]
) -> Packed:
  """The chosen leaves concatenated after `lead` axes; all other leaves come first, unchanged."""
  packed = frozenset(chosen)
  others = [i for i in range(len(leaves)) if i not in packed]
  slots = {i: _Slot(n, None, ()) for n, i in enumerate(others)}
  arrays = [leaves[i] for i in others]
  pools: dict[Any, list[int]] = {}
  for i in chosen:
    pools.setdefault(leaves[i].dtype, []).append(i)
  for pool in pools.values():
    shapes = [leaves[i].shape[lead:] for i in pool]
    sizes = [math.prod(shape) for shape in shapes]
    starts = itertools.accumulate(sizes, initial=0)
    slots.update({i: _Slot(len(arrays), start, shape) for i, start, shape in zip(pool, starts, shapes)})
    rows = [leaves[i].reshape((*leaves[i].shape[:lead], size)) for i, size in zip(pool, sizes, strict=True)]
    arrays.append(concatenate(rows, axis=lead))
  return Packed(arrays, structure, tuple(slots[i] for i in range(len(leaves))))


def _is_small(leaf: Any) -> bool:
  return isinstance(leaf, np.ndarray) and leaf.nbytes <= _SMALL


def _is_packed(node: Any) -> bool:
  return isinstance(node, Packed)
