"""Rewrites that keep a graph's function: named activations, means, and BatchNorm folded into the layer before it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from kwjax.export.graph import Node, Value, rewrite
from kwjax.export.lowering import is_static

_Private = Callable[[Value], bool]


def simplify(output: Node) -> Node:
  """The same function in fewer operations.

  - `max(x, 0)` and similar become `relu` and `clip`. A sum divided by the number of its terms becomes a mean.
  - `x * m + a` with constants for each channel becomes `affine`. If only it reads a convolution or matrix product, it is
    folded into that as the attribute `post` = (m, a).
  - Equal quantizations of one array are merged. A clip above the range that is quantized next becomes a ReLU.
  """
  seen: dict[tuple, Node] = {}

  def patterns(node: Node, private: _Private) -> Node:
    if node.op == "quantize":
      key = (node.inputs[0], float(node.attrs["scale"]), node.attrs["zero"], node.attrs["levels"])
      return seen.setdefault(key, node)
    return _affine(_mean(_matmul(_clip(node, private))), private)

  return rewrite(rewrite(output, patterns), _drop_clip)


def scalar(value: Value) -> float | None:
  """The number in a constant of one element, else None."""
  return float(value.reshape(-1)[0]) if isinstance(value, np.ndarray) and value.size == 1 else None


def _clip(node: Node, private: _Private) -> Node:
  if node.op == "clamp":
    lo, x, hi = node.inputs
    low, high = scalar(lo), scalar(hi)
    return node if low is None or high is None or node.dtype != np.float32 else _clipped(node, x, low, high)
  if node.op not in ("max", "min") or node.dtype != np.float32:
    return node
  constant, x = sorted(node.inputs, key=lambda value: isinstance(value, Node))
  bound = scalar(constant)
  if bound is None or not isinstance(x, Node):
    return node
  low, high = (bound, math.inf) if node.op == "max" else (-math.inf, bound)
  if x.op in ("relu", "clip") and private(x) and node.op == "min":
    return _clipped(node, x.inputs[0], x.attrs.get("low", 0.0), min(x.attrs.get("high", math.inf), high))
  return _clipped(node, x, low, high)


def _clipped(node: Node, x: Value, low: float, high: float) -> Node:
  if (low, high) == (0.0, math.inf):
    return dataclasses.replace(node, op="relu", inputs=(x,), attrs={})
  return dataclasses.replace(node, op="clip", inputs=(x,), attrs={"low": low, "high": high})


def _matmul(node: Node) -> Node:
  """A matrix product with a constant on its right is a dense layer."""
  if node.op != "dot_general":
    return node
  (left, right), (batch, _) = node.attrs["dimension_numbers"]
  x, kernel = node.inputs
  fits = isinstance(x, Node) and tuple(left) == (x.rank - 1,) and tuple(right) == (0,) and not batch
  if not fits or len(kernel.shape) != 2 or not is_kernel(kernel):
    return node
  return dataclasses.replace(node, op="dense", attrs={})


def is_kernel(value: Value) -> bool:
  """Whether a value does not depend on the images."""
  return isinstance(value, np.ndarray) or value.op == "weight"


def _mean(node: Node) -> Node:
  if node.op != "div" or not isinstance(node.inputs[0], Node):
    return node
  total, count = node.inputs[0], scalar(node.inputs[1])
  if total.op == "reduce_sum":
    sizes = [total.inputs[0].shape[axis] for axis in total.attrs["axes"]]
    if is_static(sizes) and count == math.prod(sizes):
      return dataclasses.replace(total, op="reduce_mean")
  if total.op == "reduce_window_sum" and count == math.prod(total.attrs["window_dimensions"]):
    return dataclasses.replace(total, op="avg_pool")
  return node


def channel_axis(node: Node) -> int | None:
  """The axis of a convolution's or dense layer's output channels."""
  if node.op == "conv_general_dilated":
    return node.attrs["dimension_numbers"].out_spec[1]
  return node.rank - 1 if node.op == "dense" else None


def _per_channel(value: Value, rank: int) -> tuple[np.ndarray, int | None] | None:
  """A constant as a vector and its axis (None: one number), or None if it varies along several axes."""
  if not isinstance(value, np.ndarray) or value.dtype != np.float32:
    return None
  wide = [axis for axis, n in enumerate(value.shape) if n > 1]
  if len(wide) > 1 or (wide and value.ndim != rank):
    return None
  return value.reshape(-1), wide[0] if wide else None


def _affine(node: Node, private: _Private) -> Node:
  if node.op not in ("add", "sub", "mul") or node.dtype != np.float32:
    return node
  index = next((i for i, value in enumerate(node.inputs) if isinstance(value, np.ndarray)), None)
  if index is None:
    return node
  x, found = node.inputs[1 - index], _per_channel(node.inputs[index], node.rank)
  if found is None or not isinstance(x, Node) or tuple(x.shape) != tuple(node.shape):
    return node
  vector, axis = found[0].astype(np.float64), found[1]
  one, nothing = np.ones_like(vector), np.zeros_like(vector)
  if node.op == "mul":
    mul, add = vector, nothing
  elif node.op == "add":
    mul, add = one, vector
  else:
    mul, add = (one, -vector) if index == 1 else (-one, vector)
  return _merged(node, x, mul, add, axis, private)


def _merged(node: Node, x: Node, mul: np.ndarray, add: np.ndarray, axis: int | None, private: _Private) -> Node:
  takes = channel_axis(x)
  if private(x) and takes is not None and is_kernel(x.inputs[1]) and axis in (None, takes):
    first, second = x.attrs.get("post", (np.ones(1), np.zeros(1)))
    post = np.broadcast_arrays(first * mul, second * mul + add, np.empty(node.shape[takes]))[:2]
    return dataclasses.replace(x, attrs={**x.attrs, "post": post})
  if private(x) and x.op == "affine" and (axis is None or x.attrs["axis"] in (None, axis)):
    mul, add = x.attrs["mul"] * mul, x.attrs["add"] * mul + add
    axis, x = (axis if x.attrs["axis"] is None else x.attrs["axis"]), x.inputs[0]  # type: ignore[assignment]
  return dataclasses.replace(node, op="affine", inputs=(x,), attrs={"mul": mul, "add": add, "axis": axis})


def _drop_clip(node: Node, private: _Private) -> Node:
  """Drop a clip that quantization repeats: an upper bound at or above the highest level has no effect."""
  if node.op != "quantize" or not isinstance(node.inputs[0], Node) or node.inputs[0].op != "clip":
    return node
  clip = node.inputs[0]
  reached = np.round(np.float32(clip.attrs["high"]) / node.attrs["scale"] + np.float32(node.attrs["zero"]))
  if not private(clip) or clip.attrs["low"] != 0.0 or reached < node.attrs["levels"] - 1:
    return node
  return dataclasses.replace(node, inputs=(dataclasses.replace(clip, op="relu", attrs={}),))
