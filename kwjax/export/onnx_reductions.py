"""Reductions, tensor products and poolings in ONNX."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kwjax.export.builder import Builder, Emitted, refuse
from kwjax.export.graph import Node
from kwjax.export.onnx_shapes import plain

REDUCTIONS = {
  "reduce_sum": ("ReduceSum", 13),
  "reduce_mean": ("ReduceMean", 18),
  "reduce_max": ("ReduceMax", 18),
  "reduce_min": ("ReduceMin", 18),
  "reduce_prod": ("ReduceProd", 18),
}


def element_type(node: Node) -> int:
  """ONNX's number for a node's type."""
  import onnx

  try:
    return int(onnx.helper.np_dtype_to_tensor_dtype(node.dtype))
  except (KeyError, ValueError) as error:
    raise refuse(node, f"type {node.dtype}") from error


def reduction(builder: Builder, node: Node) -> Emitted:
  """Reductions. Their axes became an input in different versions of the operator set."""
  value = builder.emitted(node.inputs[0])  # type: ignore[arg-type]
  axes = sorted(value.order.index(axis) for axis in node.attrs["axes"])
  kind, since = REDUCTIONS[node.op]
  if builder.opset >= since:
    constant = builder.constant(np.asarray(axes, np.int64), f"{node.scope}/axes")
    name = builder.op(kind, [value.name, constant], node.scope, keepdims=0)
  else:
    name = builder.op(kind, [value.name], node.scope, axes=axes, keepdims=0)
  left = [axis for i, axis in enumerate(value.order) if i not in axes]
  rank_of = {axis: i for i, axis in enumerate(sorted(left))}
  return Emitted(name, tuple(rank_of[axis] for axis in left))


def argument(builder: Builder, node: Node) -> Emitted:
  """ArgMax and ArgMin; the first of equal values."""
  (axis,), value = node.attrs["axes"], builder.logical(node.inputs[0])
  kind = "ArgMax" if node.op == "argmax" else "ArgMin"
  return plain(
    builder.op(
      "Cast", [builder.op(kind, [value], node.scope, axis=axis, keepdims=0)], node.scope, to=element_type(node)
    ),
    node,
  )


def einsum(builder: Builder, node: Node) -> Emitted:
  """Any other tensor product."""
  (left, right), (left_batch, right_batch) = node.attrs["dimension_numbers"]
  a, b = node.inputs
  letters = iter("abcdefghijklmnopqrstuvwxyz")
  of_a = [next(letters) for _ in a.shape]
  of_b = [""] * len(b.shape)
  for i, j in (*zip(left, right, strict=True), *zip(left_batch, right_batch, strict=True)):
    of_b[j] = of_a[i]
  of_b = [letter or next(letters) for letter in of_b]
  kept = [of_a[i] for i in left_batch]
  kept += [letter for i, letter in enumerate(of_a) if i not in (*left, *left_batch)]
  kept += [letter for j, letter in enumerate(of_b) if j not in (*right, *right_batch)]
  names = [builder.logical(v, f"{node.scope}/kernel") for v in (a, b)]
  equation = f"{''.join(of_a)},{''.join(of_b)}->{''.join(kept)}"
  return plain(builder.op("Einsum", names, node.scope, equation=equation), node)


def pooling(builder: Builder, node: Node) -> Emitted:
  """Windows over the spatial axes of channels-first images."""
  attrs, rank = node.attrs, node.rank
  size, stride = attrs["window_dimensions"], attrs["window_strides"]
  if set(attrs["base_dilation"]) != {1} or rank < 3:
    raise refuse(node, "a dilated input")
  spatial = tuple(range(1, rank - 1))
  order = (0, rank - 1, *spatial)
  if any(size[axis] != 1 or tuple(attrs["padding"][axis]) != (0, 0) for axis in (0, rank - 1)):
    raise refuse(node, "a window over the batch or over channels")
  value = builder.emitted(node.inputs[0], order)  # type: ignore[arg-type]
  options: dict[str, Any] = {
    "kernel_shape": [size[axis] for axis in spatial],
    "strides": [stride[axis] for axis in spatial],
    "pads": [int(attrs["padding"][axis][end]) for end in (0, 1) for axis in spatial],
  }
  dilations = [attrs["window_dilation"][axis] for axis in spatial]
  if set(dilations) != {1}:
    if node.op != "reduce_window_max":
      raise refuse(node, "a dilated window")
    options["dilations"] = dilations

  def pooled(kind: str, name: str, **more: Any) -> str:
    return builder.op(kind, [name], node.scope, **options, **more)

  if node.op == "reduce_window_max":
    return Emitted(pooled("MaxPool", value.name), order)
  if node.op == "reduce_window_min":
    negative = builder.op("Neg", [value.name], node.scope)
    return Emitted(builder.op("Neg", [pooled("MaxPool", negative)], node.scope), order)
  mean = pooled("AveragePool", value.name, count_include_pad=1)
  if node.op == "avg_pool":
    return Emitted(mean, order)
  count = builder.constant(np.float32(math.prod(size)), f"{node.scope}/count")
  return Emitted(builder.op("Mul", [mean, count], node.scope), order)
