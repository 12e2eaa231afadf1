"""Activation ranges: one interval for each layer, and the table of extremes that they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.errors import KwjaxError

Array = jax.Array


class Interval(NamedTuple):
  """Lowest and highest value."""

  lo: Array
  hi: Array


@jax.tree_util.register_pytree_node_class
class Ranges(Mapping[str, Interval]):
  """`{layer: Interval}` of the inputs of a network's layers, in execution order; immutable, a pytree.

  Shapes: f32[] for each layer, f32[repeats] for a layer that nn.scan stacks. Units are those of the layer's input.
  """

  def __init__(self, intervals: Mapping[str, tuple[Any, Any]]) -> None:
    self._intervals = {layer: Interval(self._array(lo), self._array(hi)) for layer, (lo, hi) in intervals.items()}

  @staticmethod
  def _array(end: Any) -> Any:
    return jnp.asarray(end, jnp.float32)

  def __getitem__(self, layer: str) -> Interval:
    return self._intervals[layer]

  def __iter__(self) -> Iterator[str]:
    return iter(self._intervals)

  def __len__(self) -> int:
    return len(self._intervals)

  def __repr__(self) -> str:
    return f"{type(self).__name__}({self._intervals!r})"

  def tree_flatten(self) -> tuple[tuple[Interval, ...], tuple[str, ...]]:
    """Children: the intervals. The layers' names and their order are static."""
    return tuple(self._intervals.values()), tuple(self._intervals)

  @classmethod
  def tree_unflatten(cls, names: tuple[str, ...], intervals: tuple[Interval, ...]) -> Self:
    """Rebuild without conversion: JAX also unflattens with placeholders for leaves."""
    found = object.__new__(cls)
    found._intervals = dict(zip(names, intervals, strict=True))
    return found

  def to_arrays(self) -> dict[str, np.ndarray]:
    """`{"layer:lo": array, "layer:hi": array}` for `np.savez` or safetensors."""
    return {f"{name}:{end}": np.asarray(getattr(self[name], end)) for name in self for end in Interval._fields}

  @classmethod
  def from_arrays(cls, arrays: Mapping[str, Any]) -> Self:
    """Ranges from the arrays of `to_arrays`, or from their file of `np.savez`.

    Raises:
      KwjaxError: a key has another form, or an end of a layer is missing.
    """
    names = dict.fromkeys(key.rpartition(":")[0] for key in arrays)
    expected = {f"{name}:{end}" for name in names for end in Interval._fields}
    if expected != set(arrays):
      raise KwjaxError(f"ranges need the arrays {sorted(expected)}, found {sorted(arrays)}")
    return cls({name: (arrays[f"{name}:lo"], arrays[f"{name}:hi"]) for name in names})

  def to_json(self) -> dict[str, list[Any]]:
    """`{layer: [lo, hi]}`, numbers or, for stacked layers, lists; float32 survives JSON exactly."""
    return {name: [np.asarray(end).tolist() for end in self[name]] for name in self}

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> Self:
    """Ranges from the dict of `to_json`.

    Raises:
      KwjaxError: an entry is not a pair of numbers or of lists of numbers.
    """
    for name, ends in value.items():
      if not isinstance(ends, (list, tuple)) or len(ends) != 2 or np.asarray(ends).dtype.kind not in "fi":
        raise KwjaxError(f"the range of layer {name} must be a pair [lowest, highest] of numbers, found {ends!r}")
    return cls({name: (ends[0], ends[1]) for name, ends in value.items()})


@jax.tree_util.register_pytree_node_class
class RangeTable(Ranges):
  """Extremes of every layer's input for every image: f32[n] for each layer, f32[n, repeats] for stacked ones; on the host."""

  @staticmethod
  def _array(end: Any) -> Any:
    # On the host: NumPy draws and averages them, so transfers to a device would be wasted.
    return np.asarray(end, np.float32)

  @property
  def count(self) -> int:
    """Number of images."""
    return int(next(iter(self.values())).lo.shape[0]) if len(self) else 0
