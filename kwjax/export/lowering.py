"""From a traced program to a graph: calls are inlined, and what does not depend on the images is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax import export

from kwjax.errors import KwjaxError
from kwjax.export.graph import Node, Value, Weight
from kwjax.export.indexing import gather_as_slices
from kwjax.export.trace import trace
from kwjax.network import Network
from kwjax.quantization.grids import activation_grid
from kwjax.quantization.integer import QTensor
from kwjax.quantization.wrap import QuantizedNetwork

_ARITHMETIC = (
  "add sub mul div max min neg exp exp2 log log1p expm1 tanh logistic sqrt rsqrt abs sign floor ceil round erf"
)
_CHOICES = "erfc pow integer_pow square sin cos select_n gt lt ge le eq ne and or not clamp convert_element_type"
_SHAPES = "reshape transpose squeeze expand_dims concatenate pad slice rev"
_SUMS = "reduce_sum reduce_max reduce_min reduce_prod argmax argmin dot_general conv_general_dilated"
_WINDOWS = "reduce_window_max reduce_window_sum reduce_window_min"
ELEMENTWISE = frozenset(f"{_ARITHMETIC} {_CHOICES}".split())
_OTHERS = frozenset(f"{_SHAPES} {_SUMS} {_WINDOWS}".split())
_IDENTITIES = frozenset({"copy", "copy_p", "stop_gradient", "optimization_barrier", "sharding_constraint"})
# In NumPy: JAX would compile a program for every new shape.
_BY_NUMPY: dict[str, Callable[..., np.ndarray]] = {
  "add": np.add,
  "sub": np.subtract,
  "mul": np.multiply,
  "div": np.divide,
  "max": np.maximum,
  "min": np.minimum,
  "neg": np.negative,
  "sqrt": np.sqrt,
  "rsqrt": lambda x: (1 / np.sqrt(x)).astype(x.dtype),
}


def lower(network: Network | QuantizedNetwork, weights: Mapping[tuple[str, ...], Weight], batch: int | None) -> Node:
  """The graph of a network's forward pass: from images f32[b,h,w,c] in [0,1] to logits f32[b,k].

  Args:
    network: float or quantized.
    weights: of `weights_of`.
    batch: number of images, or None for a symbolic number.

  Raises:
    KwjaxError: naming the operation that has no counterpart, and where in the network it is.
  """
  jaxpr, variables = trace(network, batch)
  arguments: list[Value] = []
  for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
    keys = tuple(entry.key if hasattr(entry, "key") else str(entry) for entry in path)
    arguments.append(_argument(weights.get(keys[1:]) if keys[0] == "params" else None, leaf))
  images = jaxpr.jaxpr.invars[-1].aval
  arguments.append(Node("input", (), tuple(images.shape), np.dtype(np.float32)))
  (logits,) = _Lowering().run(jaxpr.jaxpr, jaxpr.consts, arguments, "")
  if not isinstance(logits, Node):
    raise KwjaxError(f"the logits of {network.name} do not depend on its images")
  return logits


def _argument(weight: Weight | None, leaf: Any) -> Value:
  if weight is None:
    return np.asarray(leaf)
  return Node("weight", (), weight.value.shape, weight.value.dtype, {"weight": weight})


def is_static(shape: Sequence[Any]) -> bool:
  """Whether every dimension is a number."""
  return not any(export.is_symbolic_dim(n) for n in shape)


class _Lowering:
  """Interprets programs; it has no state besides the arguments of `run`."""

  def run(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Value], scope: str) -> list[Value]:
    """What the program returns for given arguments."""
    known: dict[Any, Value] = dict(zip(jaxpr.constvars, (np.asarray(c) for c in consts), strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Value:
      return (
        np.asarray(atom.val, getattr(atom.aval, "dtype", None))
        if isinstance(atom, jax.extend.core.Literal)
        else known[atom]
      )

    for equation in jaxpr.eqns:
      stack = str(equation.source_info.name_stack)
      inner = "/".join(part for part in (scope, stack) if part)
      results = self.apply(equation, [read(atom) for atom in equation.invars], inner)
      known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def apply(self, equation: Any, inputs: list[Value], scope: str) -> list[Value]:
    """The results of one equation."""
    name, params = equation.primitive.name, equation.params
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
      if key in params and name not in ("scan", "while", "cond"):
        inner = params[key]
        closed = hasattr(inner, "consts")
        return self.run(inner.jaxpr if closed else inner, inner.consts if closed else (), inputs, scope)
    if name == "kwjax_quantize":
      return [_quantize(inputs, params, scope)]
    if name == "platform_index":
      # None is the form for any other platform.
      return [np.asarray(next(i for i, entry in enumerate(params["platforms"]) if entry is None), np.int32)]
    if name == "cond" and isinstance(inputs[0], np.ndarray):
      branch = params["branches"][int(np.clip(int(inputs[0]), 0, len(params["branches"]) - 1))]
      return self.run(branch.jaxpr, branch.consts, inputs[1:], scope)
    if name == "scan":
      return self.unroll(params, inputs, scope)
    if name in _IDENTITIES:
      return inputs
    if name == "convert_element_type" and _is_fixed(inputs[0]) and params["new_dtype"] == inputs[0].dtype:
      return inputs  # an unchanged kernel keeps its integers
    if not any(isinstance(value, Node) and not _is_fixed(value) for value in inputs):
      found = _evaluate(equation, [_constant(value) for value in inputs], scope)
      if found is not None:
        return found
    return _node(name, params, inputs, [v.aval for v in equation.outvars], scope)

  def unroll(self, params: Any, inputs: list[Value], scope: str) -> list[Value]:
    """A scan over layers, unrolled."""
    body, first, carried = params["jaxpr"], params["num_consts"], params["num_carry"]
    consts, carry, stacked = inputs[:first], inputs[first : first + carried], inputs[first + carried :]
    if any(isinstance(value, Node) and value.op != "weight" for value in stacked):
      raise KwjaxError(f"{_where(scope)} scans over activations; only scans over layers can be exported")
    outputs: list[list[Value]] = []
    order = range(params["length"])
    for i in reversed(order) if params["reverse"] else order:
      slices = [_slice_of_stack(value, i) for value in stacked]
      results = self.run(body.jaxpr, body.consts, [*consts, *carry, *slices], scope)
      carry, rest = results[:carried], results[carried:]
      outputs.append(rest)
    if params["reverse"]:
      outputs.reverse()
    return [*carry, *(_stack(list(values), scope) for values in zip(*outputs, strict=True))]


def _stack(values: list[Value], scope: str) -> Value:
  if any(isinstance(value, Node) for value in values):
    # Allowed if nothing reads it; else the reader is named.
    return Node("scan", tuple(values), (), np.dtype(np.float32), {}, scope)
  return np.stack([np.asarray(value) for value in values])


def _where(scope: str) -> str:
  return scope or "the network"


def _is_fixed(value: Value) -> bool:
  return isinstance(value, Node) and value.op == "weight"


def _constant(value: Value) -> np.ndarray:
  return value.attrs["weight"].value if isinstance(value, Node) else value


def _slice_of_stack(value: Value, index: int) -> Value:
  if isinstance(value, np.ndarray):
    return value[index]
  weight: Weight = value.attrs["weight"]
  integer = None if weight.integer is None else QTensor(*(field[index] for field in weight.integer))
  sliced = weight._replace(value=weight.value[index], integer=integer, layer=f"{weight.layer}[{index}]")
  return Node("weight", (), sliced.value.shape, sliced.value.dtype, {"weight": sliced})


def _quantize(inputs: list[Value], params: Any, scope: str) -> Node:
  x, lo, hi = inputs
  layer, bits = params["layer"], params["bits"]
  if not isinstance(x, Node):
    raise KwjaxError(f"the input of layer {layer} does not depend on the images")
  if x.dtype != np.float32:
    raise KwjaxError(f"layer {layer} computes in {x.dtype}, only float32 can be exported")
  grid = activation_grid(jax.numpy.asarray(_constant(lo)), jax.numpy.asarray(_constant(hi)), bits)
  attrs = {
    "scale": np.float32(grid.scale),
    "zero": int(np.asarray(grid.zero)),
    "levels": grid.qmax + 1,
    "layer": layer,
  }
  return Node("quantize", (x,), x.shape, x.dtype, attrs, scope)


def _evaluate(equation: Any, inputs: list[np.ndarray], scope: str) -> list[Value] | None:
  """Results of an operation on constants, or None if its shape depends on the batch."""
  name, outvars = equation.primitive.name, equation.outvars
  if not all(is_static(v.aval.shape) for v in outvars):
    if name == "broadcast_in_dim":
      # Equal along the batch: size one gives every elementwise reader the same values.
      shape = [1 if export.is_symbolic_dim(n) else n for n in outvars[0].aval.shape]
      return [_broadcast(inputs[0], shape, equation.params["broadcast_dimensions"])]
    return None
  if name in _BY_NUMPY and all(v.aval.dtype == np.float32 for v in equation.invars):
    return [_BY_NUMPY[name](*inputs)]
  if name == "broadcast_in_dim":
    return [_broadcast(inputs[0], list(outvars[0].aval.shape), equation.params["broadcast_dimensions"])]
  if name == "convert_element_type":
    return [inputs[0].astype(equation.params["new_dtype"])]
  try:
    found = equation.primitive.bind(*inputs, **equation.params)
  except (TypeError, ValueError, NotImplementedError) as error:
    raise KwjaxError(f"{_where(scope)}: the operation {name} cannot be exported ({str(error)[:100]})") from error
  return [np.asarray(v) for v in (found if equation.primitive.multiple_results else [found])]


def _broadcast(value: np.ndarray, shape: list[int], dimensions: Sequence[int]) -> np.ndarray:
  widened = [1] * len(shape)
  for axis, n in zip(dimensions, value.shape, strict=True):
    widened[axis] = n
  return np.broadcast_to(value.reshape(widened), shape)


def _node(name: str, params: Any, inputs: list[Value], avals: list[Any], scope: str) -> list[Value]:
  """Nodes of an operation on activations.

  Raises:
    KwjaxError: it has no counterpart.
  """
  aval = avals[0]

  def node(op: str, values: Sequence[Value], shape: Any = aval.shape, **attrs: Any) -> Node:
    return Node(op, tuple(values), tuple(shape), np.dtype(aval.dtype), attrs, scope)

  if name == "split":
    starts = np.cumsum([0, *params["sizes"]])
    return [_piece(node, inputs[0], params["axis"], starts[i], starts[i + 1], a.shape) for i, a in enumerate(avals)]
  if name == "broadcast_in_dim":
    widened = [1] * len(aval.shape)
    for axis, n in zip(params["broadcast_dimensions"], inputs[0].shape, strict=True):
      widened[axis] = n
    found = node("reshape", inputs, widened)
    return [found if tuple(widened) == tuple(aval.shape) else node("expand", [found])]
  if name == "gather":
    return [gather_as_slices(inputs, params, node, _where(scope))]
  choice = inputs[0] if name == "select_n" and isinstance(inputs[0], np.ndarray) else None
  if choice is not None and choice.dtype == bool and (choice.all() or not choice.any()):
    return [inputs[1 + int(choice.reshape(-1)[0])]]
  if name in ELEMENTWISE:
    return [node(name, _without_expansion(inputs, aval), **params)]
  if name in _OTHERS:
    return [node(name, inputs, **params)]
  raise KwjaxError(f"{_where(scope)}: the operation {name} cannot be exported")


def _piece(node: Callable[..., Node], value: Value, axis: int, start: int, stop: int, shape: Any) -> Node:
  starts, limits = [0] * len(shape), list(value.shape)
  starts[axis], limits[axis] = int(start), int(stop)
  return node("slice", [value], shape, start_indices=starts, limit_indices=limits, strides=None)


def _without_expansion(inputs: list[Value], aval: Any) -> list[Value]:
  """Inputs of an elementwise operation. File formats broadcast if one input has the full shape."""
  full = [v for v in inputs if isinstance(v, Node) and v.op != "expand" and tuple(v.shape) == tuple(aval.shape)]
  return [v.inputs[0] if full and isinstance(v, Node) and v.op == "expand" else v for v in inputs]
