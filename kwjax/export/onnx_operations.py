"""Elementary operations in ONNX: arithmetic here, and the table of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import lax

from kwjax.export.builder import Builder, Emitted, Order, refuse
from kwjax.export.graph import Node, Value
from kwjax.export.onnx_reductions import REDUCTIONS, argument, einsum, element_type, pooling, reduction
from kwjax.export.onnx_shapes import concatenate, expand, order_of, pad, reshape, rev, slice_, transpose

Handler = Callable[[Builder, Node], Emitted]

_SIMPLE = {
  "add": "Add",
  "sub": "Sub",
  "mul": "Mul",
  "div": "Div",
  "max": "Max",
  "min": "Min",
  "neg": "Neg",
  "exp": "Exp",
  "log": "Log",
  "tanh": "Tanh",
  "logistic": "Sigmoid",
  "sqrt": "Sqrt",
  "abs": "Abs",
  "sign": "Sign",
  "floor": "Floor",
  "ceil": "Ceil",
  "erf": "Erf",
  "pow": "Pow",
  "sin": "Sin",
  "cos": "Cos",
  "gt": "Greater",
  "lt": "Less",
  "ge": "GreaterOrEqual",
  "le": "LessOrEqual",
  "eq": "Equal",
  "and": "And",
  "or": "Or",
  "not": "Not",
  "relu": "Relu",
}


def _operand(builder: Builder, node: Node, value: Value, order: Order) -> str:
  if isinstance(value, Node):
    if value.rank != node.rank:
      return builder.logical(value)
    return builder.emitted(value, order).name
  stored = value.transpose(order) if value.ndim == node.rank else value
  return builder.constant(_shrunk(stored), f"{node.scope}/constant")


def _shrunk(value: np.ndarray) -> np.ndarray:
  """The same constant with size one along every axis where it is constant."""
  for axis, n in enumerate(value.shape):
    if n > 1 and value.strides[axis] == 0:
      value = value.take([0], axis)
  return value


def elementwise(builder: Builder, node: Node) -> Emitted:
  """Arithmetic that has another name in ONNX, or needs two operations."""
  order = order_of(builder, node)
  names = [_operand(builder, node, value, order) for value in node.inputs]

  def op(kind: str, *inputs: str, **attrs: Any) -> str:
    return builder.op(kind, inputs, node.scope, **attrs)

  def number(value: Any) -> str:
    return builder.constant(np.asarray(value, node.dtype), f"{node.scope}/constant")

  kind = node.op
  if kind in _SIMPLE:
    found = op(_SIMPLE[kind], *names)
  elif kind == "select_n":
    if len(names) != 3 or node.inputs[0].dtype != bool:
      raise refuse(node, "only a choice between two values by a condition can")
    found = op("Where", names[0], names[2], names[1])
  elif kind == "convert_element_type":
    found = op("Cast", *names, to=element_type(node))
  elif kind == "clamp":
    found = op("Min", op("Max", names[1], names[0]), names[2])
  elif kind == "round":
    if node.attrs["rounding_method"] != lax.RoundingMethod.TO_NEAREST_EVEN:
      raise refuse(node, "rounding half away from zero")
    found = op("Round", *names)
  elif kind == "integer_pow":
    found = op("Pow", *names, number(node.attrs["y"]))
  elif kind in ("square", "rsqrt", "log1p", "expm1", "erfc", "exp2", "ne"):
    found = {
      "square": lambda: op("Mul", *names, *names),
      "rsqrt": lambda: op("Reciprocal", op("Sqrt", *names)),
      "log1p": lambda: op("Log", op("Add", *names, number(1))),
      "expm1": lambda: op("Sub", op("Exp", *names), number(1)),
      "erfc": lambda: op("Sub", number(1), op("Erf", *names)),
      "exp2": lambda: op("Exp", op("Mul", *names, number(math.log(2)))),
      "ne": lambda: op("Not", op("Equal", *names)),
    }[kind]()
  else:
    raise refuse(node, "ONNX has no counterpart")
  return Emitted(found, order)


def clip(builder: Builder, node: Node) -> Emitted:
  """Clip with the bounds that are finite."""
  value = builder.emitted(node.inputs[0])  # type: ignore[arg-type]
  bounds = [
    builder.constant(np.float32(b), f"{node.scope}/{end}") if math.isfinite(b) else ""
    for end, b in (("low", node.attrs["low"]), ("high", node.attrs["high"]))
  ]
  names = [value.name, *bounds]
  return Emitted(builder.op("Clip", names[:2] if not bounds[1] else names, node.scope), value.order)


def affine(builder: Builder, node: Node) -> Emitted:
  """The function x * mul + add with constants for each channel; a factor of 1 and a term of 0 are left out."""
  value = builder.emitted(node.inputs[0])  # type: ignore[arg-type]
  return Emitted(
    scale_and_shift(builder, node, value, node.attrs["mul"], node.attrs["add"], node.attrs["axis"]), value.order
  )


def scale_and_shift(
  builder: Builder, node: Node, value: Emitted, mul: np.ndarray, add: np.ndarray, axis: int | None
) -> str:
  """The name of value * mul + add, both running along `axis` of the channels-last array."""
  shape = [1] * len(value.order)
  if axis is not None:
    shape[value.order.index(axis)] = -1
  name = value.name
  for kind, constant, neutral in (("Mul", mul, 1.0), ("Add", add, 0.0)):
    if (constant != neutral).any():
      shaped = constant.astype(np.float32).reshape(shape if axis is not None else ())
      name = builder.op(kind, [name, builder.constant(shaped, f"{node.scope}/{kind.lower()}")], node.scope)
  return name


HANDLERS: dict[str, Handler] = {
  "clip": clip,
  "affine": affine,
  "reshape": reshape,
  "squeeze": reshape,
  "expand_dims": reshape,
  "expand": expand,
  "transpose": transpose,
  "concatenate": concatenate,
  "pad": pad,
  "slice": slice_,
  "rev": rev,
  **dict.fromkeys(REDUCTIONS, reduction),
  "argmax": argument,
  "argmin": argument,
  "dot_general": einsum,
  **dict.fromkeys(("reduce_window_max", "reduce_window_sum", "reduce_window_min", "avg_pool"), pooling),
}
