"""Builds an ONNX graph: names, constants, and the order in which an array's axes are stored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kwjax.errors import KwjaxError
from kwjax.export.graph import Node, Value

Order = tuple[int, ...]


class Emitted(NamedTuple):
  """An array in the file. Invariant: stored axis i is axis `order[i]` of the channels-last array."""

  name: str
  order: Order


class Quantized(NamedTuple):
  """An 8 bit array in the file, value = (q - zero) * scale."""

  q: Emitted
  scale: str
  zero: str
  node: Node


class Builder:
  """Collects the nodes and initializers of one export."""

  def __init__(self, opset: int) -> None:
    import onnx

    self.opset = opset
    self.nodes: list[Any] = []
    self.initializers: dict[str, Any] = {}
    self._helper, self._numpy = onnx.helper, onnx.numpy_helper
    self._emitted: dict[Node, Emitted] = {}
    self._quantized: dict[Node, Quantized] = {}
    self._constants: dict[tuple, str] = {}
    self._used: dict[str, int] = {}

  def unique(self, text: str) -> str:
    """A name that no other array or node has."""
    base = re.sub(r"[^A-Za-z0-9_./-]+", "_", text).strip("/") or "x"
    self._used[base] = self._used.get(base, 0) + 1
    return base if self._used[base] == 1 else f"{base}.{self._used[base]}"

  def constant(self, value: np.ndarray | np.generic, name: str) -> str:
    """An initializer; equal ones of one kind are stored once."""
    array = np.array(value, order="C", copy=True)
    key = (name.rpartition("/")[2], str(array.dtype), array.shape, array.tobytes())
    if key not in self._constants:
      self._constants[key] = self.unique(name)
      self.initializers[self._constants[key]] = self._numpy.from_array(array, self._constants[key])
    return self._constants[key]

  def op(self, kind: str, inputs: Sequence[str], scope: str, **attrs: Any) -> str:
    """Add a node with one output; returns the output's name."""
    name = self.unique(f"{scope}/{kind}")
    self.nodes.append(self._helper.make_node(kind, list(inputs), [name], name=name, **attrs))
    return name

  def emitted(self, node: Node, order: Order | None = None) -> Emitted:
    """The array of a node that was emitted before, stored in the given order (default: as it is).

    A quantized array is dequantized for a node that reads floats.
    """
    if node not in self._emitted:
      found = self._quantized[node]
      name = self.op("DequantizeLinear", [found.q.name, found.scale, found.zero], node.scope)
      self._emitted[node] = Emitted(name, found.q.order)
    return self.ordered(self._emitted[node], order, node.scope)

  def ordered(self, value: Emitted, order: Order | None, scope: str) -> Emitted:
    """The same array stored in another order."""
    if order is None or order == value.order:
      return value
    permutation = [value.order.index(axis) for axis in order]
    return Emitted(self.op("Transpose", [value.name], scope, perm=permutation), order)

  def logical(self, value: Value, name: str = "constant") -> str:
    """A value with its axes as JAX has them."""
    if isinstance(value, Node):
      return self.emitted(value, tuple(range(value.rank))).name
    return self.constant(value, name)

  def quantized(self, node: Node, order: Order) -> Quantized:
    """The 8 bit array of a `quantize` node, stored in the given order."""
    found = self._quantized[node]
    return found._replace(q=self.ordered(found.q, order, node.scope))

  def set(self, node: Node, value: Emitted | Quantized) -> None:
    """Store the array that a node became."""
    if isinstance(value, Quantized):
      self._quantized[node] = value
    else:
      self._emitted[node] = value


def refuse(node: Node, reason: str) -> KwjaxError:
  """The error for an operation that cannot be written."""
  return KwjaxError(f"{node.scope or 'the network'}: the operation {node.op} cannot be exported ({reason})")
