"""A network as an ONNX file: simulated low precision becomes integer weights and QuantizeLinear/DequantizeLinear pairs."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from kwjax.errors import KwjaxError, RuleError
from kwjax.export.builder import Builder, Emitted
from kwjax.export.graph import Node, Weight, consumers, nodes_of
from kwjax.export.lowering import ELEMENTWISE, lower
from kwjax.export.onnx_layers import Form, Written, convolution, dense, quantize
from kwjax.export.onnx_operations import HANDLERS, elementwise
from kwjax.export.simplify import simplify
from kwjax.export.trace import float_network, rules_of, weights_of
from kwjax.network import Network
from kwjax.quantization.wrap import QuantizedNetwork

OPSETS = (13, 23)
# The newest file format that a runtime must know for an operator set.
_IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
_LARGEST = 2_000_000_000  # bytes; a protobuf message ends at 2 GiB


class OnnxFacts(NamedTuple):
  """What an ONNX file holds.

  Attributes:
    path: of the file.
    size: bytes.
    opset: version of the operator set.
    layers: `{layer: "weights TYPE, ARITHMETIC"}` of every convolution and dense layer in execution order.
    float_layers: `{layer: why}` of the layers that do not compute in integers; empty for a float network.
    notes: what a user of the file should know, in sentences.
  """

  path: pathlib.Path
  size: int
  opset: int
  layers: Mapping[str, str]
  float_layers: Mapping[str, str]
  notes: tuple[str, ...]


def export_onnx(
  network: Network | QuantizedNetwork,
  path: str | pathlib.Path,
  *,
  opset: int = 20,
  form: Literal["qdq", "integer"] = "qdq",
  weights: Literal["auto", "int8"] = "auto",
  layout: Literal["nhwc", "nchw"] = "nhwc",
  batch: int | None = None,
  allow_float_weights: bool = False,
) -> OnnxFacts:
  r"""Write a network as an ONNX file that takes images in [0,1], normalisation included, and gives logits.

  Every quantized activation is `(q - zero) * scale` with q uint8, scale and zero point one a tensor; every quantized kernel
  the same with one scale an output channel. BatchNorm behind a convolution is folded: $s_c' = s_c |\gamma_c| / \sigma_c$, a
  negative $\gamma_c$ turning the signs of the channel's integers.

  Args:
    network: quantized, or float for a float file.
    path: of the file; its folder must exist.
    opset: operator set, 13 to 23. From 21 on kernels of at most 4 bits are stored as int4, which onnxruntime's CPU kernels
      compute with in float.
    form: "qdq": QuantizeLinear and DequantizeLinear alone. "integer": convolutions whose result stays float, such as those
      before a residual addition, are ConvInteger, which onnxruntime runs faster; other runtimes may not know it.
    weights: "auto": int8, but uint8 with zero point 128 where int8 could saturate on x86 processors without VNNI. "int8":
      always int8, as TensorRT needs.
    layout: of the input: images f32[batch,h,w,c] or f32[batch,c,h,w].
    batch: fixed number of images, or None for any.
    allow_float_weights: write layers without an integer form with float weights instead of refusing them.

  Returns:
    Facts about the file.

  Raises:
    RuleError: a layer's weight scheme has no integer form.
    KwjaxError: an operation of the network has no counterpart, or an argument is out of range.
  """
  onnx = _import_onnx()
  _check(opset, onnx.defs.onnx_opset_version(), form, weights, layout, batch)
  kernels = weights_of(network)
  if not allow_float_weights:
    _check_schemes(network.name, kernels.values())
  output = simplify(lower(network, kernels, batch))
  builder = Builder(opset)
  written = _write(builder, output, Form(form == "integer", weights == "int8", opset >= 21), layout)
  base = float_network(network)
  names = {"nhwc": base.image_shape, "nchw": (base.image_shape[2], *base.image_shape[:2])}
  count = "batch" if batch is None else batch
  final = builder.emitted(output, (0, 1)).name
  builder.nodes.append(onnx.helper.make_node("Identity", [final], ["logits"], name="logits"))
  tensor = onnx.helper.make_tensor_value_info
  graph = onnx.helper.make_graph(
    builder.nodes,
    "kwjax",
    [tensor("images", onnx.TensorProto.FLOAT, [count, *names[layout]])],
    [tensor("logits", onnx.TensorProto.FLOAT, [count, output.shape[1]])],
    list(builder.initializers.values()),
  )
  model = onnx.helper.make_model(
    graph, producer_name="kwjax", opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=_IR_VERSIONS[opset]
  )
  onnx.helper.set_model_props(model, {"network": network.name, **_protocol(network)})
  size = _save(onnx, model, pathlib.Path(path))
  return _facts(network, pathlib.Path(path), size, opset, written, output, kernels.values())


def _import_onnx() -> Any:
  try:
    import onnx
  except ImportError as error:
    raise KwjaxError('writing ONNX files needs the package onnx: pip install "kwjax[onnx]"') from error
  return onnx


def _check(opset: int, newest: int, form: str, weights: str, layout: str, batch: int | None) -> None:
  if not OPSETS[0] <= opset <= OPSETS[1]:
    raise KwjaxError(f"opset must be {OPSETS[0]} to {OPSETS[1]}, found {opset}")
  if opset > newest:
    raise KwjaxError(f"the installed onnx knows operator sets up to {newest}, found opset {opset}: install a newer one")
  for what, value, known in (
    ("form", form, ("qdq", "integer")),
    ("weights", weights, ("auto", "int8")),
    ("layout", layout, ("nhwc", "nchw")),
  ):
    if value not in known:
      raise KwjaxError(f"{what} must be {' or '.join(known)}, found {value!r}")
  if batch is not None and batch < 1:
    raise KwjaxError(f"batch must be at least 1, or None for any number of images, found {batch}")


def _check_schemes(name: str, kernels: Iterable[Weight]) -> None:
  found = {w.layer: w.reason for w in kernels if w.bits is not None and w.integer is None}
  if found:
    layer, reason = next(iter(found.items()))
    more = f" (and {len(found) - 1} more layers)" if len(found) > 1 else ""
    raise RuleError(
      f"layer {layer}{more} of {name} has no integer weights: {reason}; quantize with "
      "QuantRules.parse(..., weights='affine0') or --weight-scheme affine0, or allow float weights"
    )


def _protocol(network: Network | QuantizedNetwork) -> dict[str, str]:
  return {"quantization": network.rules.describe()} if isinstance(network, QuantizedNetwork) else {}


def _write(builder: Builder, output: Node, form: Form, layout: str) -> dict[str, Written]:
  """Emit every node; returns what each layer became."""
  readers = consumers(output)
  written: dict[str, Written] = {}
  for node in readers:
    if node.op == "input":
      # Stored axis i of the input is axis order[i] of the channels-last images.
      builder.set(node, Emitted("images", (0, 3, 1, 2) if layout == "nchw" else (0, 1, 2, 3)))
      builder.unique("images"), builder.unique("logits")
    elif node.op == "quantize":
      builder.set(node, quantize(builder, node))
    elif node.op in ("conv_general_dilated", "dense"):
      found = (
        dense(builder, node, form)
        if node.op == "dense"
        else convolution(builder, node, form, rounded_next=_rounded_next(node, readers))
      )
      kernel = node.inputs[1]
      written[kernel.attrs["weight"].layer if isinstance(kernel, Node) else node.scope] = found
      builder.set(node, found.value)
    elif node.op == "weight":
      # Layers read it where it is; anything else gets the values.
      _set_weight(builder, node, readers)
    elif node.op in HANDLERS:
      builder.set(node, HANDLERS[node.op](builder, node))
    elif node.op in ELEMENTWISE or node.op == "relu":
      builder.set(node, elementwise(builder, node))
    else:
      raise KwjaxError(f"{node.scope or 'the network'}: the operation {node.op} cannot be exported")
  return written


def _set_weight(builder: Builder, node: Node, readers: Mapping[Node, list[Node]]) -> None:
  if any(reader.op not in ("conv_general_dilated", "dense") for reader in readers[node]):
    weight = node.attrs["weight"]
    name = builder.constant(np.asarray(weight.value, np.float32), f"{weight.layer}/kernel")
    builder.set(node, Emitted(name, tuple(range(node.rank))))


def _rounded_next(node: Node, readers: Mapping[Node, list[Node]]) -> bool:
  """Whether a layer's result goes, at most through a ReLU, into one rounding to 8 bits and nowhere else."""
  following = readers[node]
  if len(following) == 1 and following[0].op == "relu":
    following = readers[following[0]]
  return len(following) == 1 and following[0].op == "quantize" and following[0].attrs["levels"] == 256


def _save(onnx: Any, model: Any, path: pathlib.Path) -> int:
  from kwjax.runtime.files import atomic_write

  if model.ByteSize() > _LARGEST:
    raise KwjaxError(f"the network has {model.ByteSize()} bytes, more than the 2 GB that one ONNX file can hold")
  onnx.checker.check_model(model, full_check=True)
  payload = model.SerializeToString()
  try:
    atomic_write(path, payload)
  except OSError as error:
    raise KwjaxError(f"cannot write {path}: {error.strerror or error}") from error
  return len(payload)


def _facts(
  network: Network | QuantizedNetwork,
  path: pathlib.Path,
  size: int,
  opset: int,
  written: Mapping[str, Written],
  output: Node,
  weights: Iterable[Weight],
) -> OnnxFacts:
  rules = rules_of(network)
  layers = {layer: f"weights {found.weights}, {found.how}" for layer, found in written.items()}
  reasons = {}
  if isinstance(network, QuantizedNetwork):
    kernels = {weight.layer: weight for weight in weights}
    for layer, found in written.items():
      if found.how not in ("Q/DQ", "ConvInteger"):
        name = layer.split("[")[0]
        rule = rules.get(name)
        if rule is not None and rule.activation_bits is None:
          reasons[layer] = "its input is float"
        elif name in kernels and kernels[name].reason:
          reasons[layer] = kernels[name].reason
        else:
          reasons[layer] = found.how
  return OnnxFacts(path, size, opset, layers, reasons, tuple(_notes(network, written, output)))


def _notes(network: Network | QuantizedNetwork, written: Mapping[str, Written], output: Node) -> list[str]:
  notes = []
  kinds = [found.weights for found in written.values()]
  if "int4" in kinds:
    notes.append("onnxruntime's CPU kernels compute layers with int4 weights in float; opset 20 stores them as int8")
  levels = [node.attrs["levels"] for node in nodes_of(output, "quantize")]
  if levels and min(levels) < 256:
    notes.append(
      "activations of fewer than 8 bits are clipped and stored as uint8; onnxruntime's integer kernels take them in form "
      "'integer' only"
    )
  missing = [layer for layer in rules_of(network) if not any(key.split("[")[0] == layer for key in written)]
  if missing:
    notes.append(f"written as plain operations, not as layers: {', '.join(missing)}")
  return notes
