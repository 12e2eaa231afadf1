"""A network as a graph of elementary operations on channels-last arrays; every exporter reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from kwjax.quantization.integer import QTensor


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
  """One operation. Invariant: it equals only itself, and its inputs come before it.

  Attributes:
    op: name of a JAX primitive, or one of `input`, `weight`, `quantize`, `relu`, `clip`, `affine`, `avg_pool`,
      `reduce_mean`, `expand`.
    inputs: nodes, or constants.
    shape: of the result; the batch is a symbolic dimension or a number.
    dtype: of the result.
    attrs: parameters of the primitive.
    scope: path of its module, for names and messages.
  """

  op: str
  inputs: tuple[Value, ...]
  shape: tuple[Any, ...]
  dtype: np.dtype
  attrs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  scope: str = ""

  @property
  def rank(self) -> int:
    """Number of axes."""
    return len(self.shape)


Value = Node | np.ndarray


class Weight(NamedTuple):
  """A layer's kernel as the quantized network uses it.

  Attributes:
    layer: path of its layer.
    value: f32, what the forward pass multiplies with.
    integer: the same as integers, or None without an integer form.
    reason: why it has none, or "".
    bits: of the rule, None for float weights.
  """

  layer: str
  value: np.ndarray
  integer: QTensor | None
  reason: str
  bits: int | None


def topological(output: Node) -> list[Node]:
  """All nodes that the output needs, each after its inputs; without recursion, as networks are deep."""
  done: dict[Node, None] = {}
  waiting = [output]
  while waiting:
    node = waiting[-1]
    missing = [i for i in node.inputs if isinstance(i, Node) and i not in done]
    if node in done or not missing:
      done.setdefault(waiting.pop())
    else:
      waiting.extend(missing)
  return list(done)


def consumers(output: Node) -> dict[Node, list[Node]]:
  """The nodes that read each node; the output also has the reader None."""
  found: dict[Node, list[Node]] = {node: [] for node in topological(output)}
  for node in found:
    for value in node.inputs:
      if isinstance(value, Node):
        found[value].append(node)
  return found


def rewrite(output: Node, rule: Callable[[Node, Callable[[Value], bool]], Node]) -> Node:
  """Rebuild the graph from its inputs, with every node replaced by the result of `rule`.

  Args:
    output: the last node.
    rule: `(node with rewritten inputs, is_private) -> node`; `is_private(value)` tells whether only one node reads it.
  """
  readers = consumers(output)
  new: dict[Node, Node] = {}
  origin: dict[Node, Node] = {}
  for node in readers:
    inputs = tuple(new[i] if isinstance(i, Node) else i for i in node.inputs)
    changed = any(a is not b for a, b in zip(inputs, node.inputs, strict=True))
    current = dataclasses.replace(node, inputs=inputs) if changed else node
    found = rule(current, lambda value: isinstance(value, Node) and len(readers[origin[value]]) == 1)
    new[node] = found
    # A node that replaces several old ones has the readers of the last one.
    origin[found] = node
  return new[output]


def nodes_of(output: Node, op: str) -> Iterator[Node]:
  """The nodes of one operation in execution order."""
  return (node for node in topological(output) if node.op == op)
