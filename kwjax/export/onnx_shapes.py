"""Operations in ONNX that move elements: shapes, slices, padding."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import export

from kwjax.export.builder import Builder, Emitted, Order, refuse
from kwjax.export.graph import Node, Value


def order_of(builder: Builder, node: Node) -> Order:
  """The stored order that an elementwise operation keeps: that of its first input whose channels come first."""
  orders = [builder.emitted(v).order for v in node.inputs if isinstance(v, Node) and v.rank == node.rank]
  identity = tuple(range(node.rank))
  return next((order for order in orders if order != identity), identity)


def reshape(builder: Builder, node: Node) -> Emitted:
  """Reshape of the channels-last array; one dimension may depend on the batch."""
  symbolic = [axis for axis, n in enumerate(node.shape) if export.is_symbolic_dim(n)]
  if len(symbolic) > 1:
    raise refuse(node, f"several dimensions of {node.shape} follow the batch")
  shape = np.asarray([-1 if axis in symbolic else n for axis, n in enumerate(node.shape)], np.int64)
  name = builder.logical(node.inputs[0])
  return plain(builder.op("Reshape", [name, builder.constant(shape, f"{node.scope}/shape")], node.scope), node)


def plain(name: str, node: Node) -> Emitted:
  """An array whose axes are stored as JAX has them."""
  return Emitted(name, tuple(range(node.rank)))


def expand(builder: Builder, node: Node) -> Emitted:
  """Repeat along axes of size one; a constant cannot be repeated along the batch."""
  x = node.inputs[0]
  grown = [axis for axis, (a, b) in enumerate(zip(x.shape, node.shape, strict=True)) if str(a) != str(b)]
  if any(export.is_symbolic_dim(node.shape[axis]) for axis in grown):
    raise refuse(node, "an array that does not depend on the images is repeated for each of them")
  shape = np.asarray([node.shape[axis] if axis in grown else 1 for axis in range(node.rank)], np.int64)
  return plain(
    builder.op("Expand", [builder.logical(x), builder.constant(shape, f"{node.scope}/shape")], node.scope), node
  )


def transpose(builder: Builder, node: Node) -> Emitted:
  """A transposition without copying: only the recorded order changes."""
  value, permutation = builder.emitted(node.inputs[0]), list(node.attrs["permutation"])  # type: ignore[arg-type]
  return Emitted(value.name, tuple(permutation.index(axis) for axis in value.order))


def concatenate(builder: Builder, node: Node) -> Emitted:
  """Concat along the stored axis."""
  order = order_of(builder, node)
  for value in node.inputs:
    if isinstance(value, np.ndarray) and len(value) != node.shape[0] and node.attrs["dimension"] != 0:
      raise refuse(node, "an array that does not depend on the images is repeated for each of them")
  names = [_operand_whole(builder, node, value, order) for value in node.inputs]
  return Emitted(builder.op("Concat", names, node.scope, axis=order.index(node.attrs["dimension"])), order)


def _operand_whole(builder: Builder, node: Node, value: Value, order: Order) -> str:
  if isinstance(value, Node):
    return builder.emitted(value, order).name
  return builder.constant(value.transpose(order), f"{node.scope}/constant")


def pad(builder: Builder, node: Node) -> Emitted:
  """Pad with a constant; negative padding cuts off."""
  config = node.attrs["padding_config"]
  if any(interior for _, _, interior in config) or not isinstance(node.inputs[1], np.ndarray):
    raise refuse(node, "padding between elements, or with a value that is computed")
  value = builder.emitted(node.inputs[0])  # type: ignore[arg-type]
  name = value.name
  ends = np.asarray([[max(end, 0) for end in config[axis][:2]] for axis in value.order], np.int64)
  cuts = np.asarray([[max(-end, 0) for end in config[axis][:2]] for axis in value.order], np.int64)
  if ends.any():
    amounts = builder.constant(ends.T.reshape(-1), f"{node.scope}/pads")
    filler = builder.constant(node.inputs[1], f"{node.scope}/filler")
    name = builder.op("Pad", [name, amounts, filler], node.scope)
  if cuts.any():
    stops = np.where(cuts[:, 1] > 0, -cuts[:, 1], np.iinfo(np.int64).max)
    axes = [axis for axis in range(node.rank) if cuts[axis].any()]
    name = _slice(builder, node, name, cuts[axes, 0], stops[axes], axes, np.ones(len(axes), np.int64))
  return Emitted(name, value.order)


def _slice(builder: Builder, node: Node, name: str, starts: Any, stops: Any, axes: Any, steps: Any) -> str:
  fields = zip(("starts", "ends", "axes", "steps"), (starts, stops, axes, steps), strict=True)
  constants = [builder.constant(np.asarray(v, np.int64), f"{node.scope}/{key}") for key, v in fields]
  return builder.op("Slice", [name, *constants], node.scope)


def slice_(builder: Builder, node: Node) -> Emitted:
  """Slice along the axes that shrink."""
  value = builder.emitted(node.inputs[0])  # type: ignore[arg-type]
  starts, limits = node.attrs["start_indices"], node.attrs["limit_indices"]
  strides, shape = node.attrs["strides"] or [1] * node.rank, node.inputs[0].shape
  cut = [a for a in range(node.rank) if starts[a] != 0 or strides[a] != 1 or str(limits[a]) != str(shape[a])]
  if not cut:
    return value
  if any(export.is_symbolic_dim(limits[axis]) for axis in cut):
    raise refuse(node, "a slice of the batch")
  axes = [value.order.index(axis) for axis in cut]
  taken = [[sequence[axis] for axis in cut] for sequence in (starts, limits, strides)]
  return Emitted(_slice(builder, node, value.name, taken[0], taken[1], axes, taken[2]), value.order)


def rev(builder: Builder, node: Node) -> Emitted:
  """Reversal as a slice with step -1."""
  value = builder.emitted(node.inputs[0])  # type: ignore[arg-type]
  axes = [value.order.index(axis) for axis in node.attrs["dimensions"]]
  first, last = np.full(len(axes), -1), np.full(len(axes), np.iinfo(np.int64).min)
  return Emitted(_slice(builder, node, value.name, first, last, axes, first), value.order)
