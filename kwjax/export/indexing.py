"""Indexing with fixed positions, which JAX writes as a gather where the batch is symbolic, as slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kwjax.errors import KwjaxError
from kwjax.export.graph import Node, Value


def gather_as_slices(inputs: Sequence[Value], params: Any, node: Callable[..., Node], where: str) -> Node:
  """`x[:, ::2, ::2]`, `x[:, 0]`, `x[:, 1:3]` and their like as a slice, a reversal and a reshape.

  Args:
    inputs: the array and the constant positions i32[..., k].
    params: of the gather.
    node: makes a node: `(op, inputs, shape, **attrs)`.
    where: the module, for messages.

  Raises:
    KwjaxError: the positions are not fixed, or not evenly spaced.
  """
  x, positions = inputs
  numbers = params["dimension_numbers"]
  refusal = KwjaxError(f"{where}: indexing (gather) can be exported at fixed, evenly spaced positions only")
  if not isinstance(positions, np.ndarray) or numbers.operand_batching_dims:
    raise refusal
  rank, grid_rank = len(x.shape), positions.ndim - 1
  start, step, count = [0] * rank, [1] * rank, list(params["slice_sizes"])
  axis_of_grid: dict[int, int] = {}
  for column, axis in enumerate(numbers.start_index_map):
    found = _progression(positions[..., column], grid_rank, set(axis_of_grid))
    if found is None:
      raise refusal
    grid_axis, first, distance, length = found
    start[axis], step[axis] = first, distance
    if grid_axis is not None:
      if params["slice_sizes"][axis] != 1 or axis not in numbers.collapsed_slice_dims:
        raise refusal
      axis_of_grid[grid_axis], count[axis] = axis, length
  if len(axis_of_grid) != grid_rank:
    raise refusal
  return _assemble(x, start, step, count, numbers, axis_of_grid, node)


def _progression(values: np.ndarray, rank: int, taken: set[int]) -> tuple[int | None, int, int, int] | None:
  """`(grid axis or None, first, distance, length)` of positions that change evenly along at most one axis."""
  free = [axis for axis in range(rank) if axis not in taken]
  for axis in free:
    line = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    if (line == line[:, :1]).all() and (values.shape[axis] > 1 or len(free) == 1):
      steps = np.unique(np.diff(line[:, 0]))
      if len(steps) > 1 or (len(steps) == 1 and steps[0] == 0):
        return None
      return axis, int(line[0, 0]), int(steps[0]) if len(steps) else 1, len(line)
  return (None, int(values.reshape(-1)[0]), 1, 1) if values.size == 1 or (values == values.flat[0]).all() else None


def _assemble(
  x: Value,
  start: list[int],
  step: list[int],
  count: list[Any],
  numbers: Any,
  axis_of_grid: dict[int, int],
  node: Callable[..., Node],
) -> Node:
  rank = len(x.shape)
  flipped = [axis for axis in range(rank) if step[axis] < 0]
  low = [start[a] + (count[a] - 1) * step[a] if a in flipped else start[a] for a in range(rank)]
  stride = [abs(s) for s in step]
  limits = [low[a] + (count[a] - 1) * stride[a] + 1 if stride[a] > 1 or low[a] else count[a] for a in range(rank)]
  found = node("slice", [x], count, start_indices=low, limit_indices=limits, strides=stride)
  if flipped:
    found = node("rev", [found], count, dimensions=tuple(flipped))
  kept = [axis for axis in range(rank) if axis not in numbers.collapsed_slice_dims]
  # The axes of the grid of positions fill the places that no axis of the array has.
  grid, array = iter(sorted(axis_of_grid)), iter(kept)
  positions = range(len(kept) + len(axis_of_grid))
  result = [next(array) if position in numbers.offset_dims else axis_of_grid[next(grid)] for position in positions]
  dropped = [axis for axis in range(rank) if axis not in result]
  order = [*result, *dropped]
  if order != sorted(order):
    found = node("transpose", [found], [count[a] for a in order], permutation=tuple(order))
  shape = [count[axis] for axis in result]
  return node("reshape", [found], shape) if dropped else found
