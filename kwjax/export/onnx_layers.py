"""Convolutions, dense layers and the rounding of their inputs in ONNX, in forms that runtimes match to integer kernels.

A layer is `DequantizeLinear -> Conv or Gemm` with a DequantizeLinear on its kernel. If the result is only rounded next,
runtimes compute it in integers (QLinearConv), with the bias rounded to a multiple of the products' scale. Otherwise
onnxruntime computes in float. ConvInteger computes exact integers in both cases and scales them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from kwjax.export.builder import Builder, Emitted, Order, Quantized, refuse
from kwjax.export.graph import Node, Value, Weight
from kwjax.export.onnx_operations import scale_and_shift

_INT16_MAX = 32767


@dataclasses.dataclass(frozen=True)
class Form:
  """How layers are written.

  Attributes:
    integer: ConvInteger for convolutions that are not grouped.
    int8_only: kernels are int8 with zero point 0, even if x86 processors without VNNI would saturate.
    int4: kernels of at most 4 bits are stored in 4 bits.
  """

  integer: bool
  int8_only: bool
  int4: bool


class Kernel(NamedTuple):
  """Integers of a kernel, output channels first: value = (q - zero) * scale.

  Attributes:
    q: i32[d, ...].
    zero: i32[d].
    scale: f32[d], positive.
  """

  q: np.ndarray
  zero: np.ndarray
  scale: np.ndarray


def quantize(builder: Builder, node: Node) -> Quantized:
  """QuantizeLinear to uint8. With fewer bits, values above the highest level are clipped before.

  Runtimes do not fuse a layer with such a clip into QLinearConv. That keeps its bias exact: rounded to the products' scale
  it would lose more the fewer the bits. ConvInteger still computes it in integers.
  """
  layer, scale, zero = node.attrs["layer"], node.attrs["scale"], node.attrs["zero"]
  value = builder.emitted(node.inputs[0])  # type: ignore[arg-type]
  name = value.name
  if node.attrs["levels"] < 256:
    top = np.float32(node.attrs["levels"] - 1 - zero) * scale
    name = builder.op("Clip", [name, "", builder.constant(top, f"{layer}/input_top")], layer)
  constants = (builder.constant(scale, f"{layer}/input_scale"), builder.constant(np.uint8(zero), f"{layer}/input_zero"))
  name = builder.op("QuantizeLinear", [name, *constants], layer)
  return Quantized(Emitted(name, value.order), *constants, node)


def channels_first(weight: Weight, permutation: tuple[int, ...]) -> Kernel | None:
  """A kernel's integers with output channels first, or None without integers or without one scale for each channel."""
  if weight.integer is None:
    return None
  q, scale, zero = (np.asarray(field).transpose(permutation) for field in weight.integer)
  if scale.size != scale.shape[0] or scale.shape[0] not in (1, q.shape[0]):
    return None
  vectors = [np.broadcast_to(field.reshape(-1), (q.shape[0],)) for field in (zero, scale)]
  return _centred(Kernel(q.astype(np.int32), vectors[0].astype(np.int32), vectors[1].astype(np.float32)))


def _centred(kernel: Kernel) -> Kernel:
  """The kernel with zero point 0, if its values then fit into int8."""
  shape = (-1,) + (1,) * (kernel.q.ndim - 1)
  value = kernel.q - kernel.zero.reshape(shape)
  fits = value.min() >= -128 and value.max() <= 127
  return Kernel(value, np.zeros_like(kernel.zero), kernel.scale) if fits else kernel


def folded(kernel: Kernel, factor: np.ndarray) -> Kernel | None:
  """The kernel times one factor for each channel. The sign goes into the integers; factor 0 gives a zero channel.

  Returns None if a scale leaves the range of float32.
  """
  shape = (-1,) + (1,) * (kernel.q.ndim - 1)
  dead, negative = factor == 0, factor < 0
  scale = np.where(dead, kernel.scale, kernel.scale * np.abs(factor)).astype(np.float32)
  if not np.isfinite(scale).all() or scale.min() < np.finfo(np.float32).tiny:
    return None
  centred = not kernel.zero.any()
  # -(q - zero) = (-1 - q) - (-1 - zero) stays within the type; -q can leave it.
  flipped = Kernel(-1 - kernel.q, -1 - kernel.zero, scale)
  if centred and (kernel.q[negative] > -128).all():
    flipped = Kernel(-kernel.q, kernel.zero, scale)
  q = np.where(negative.reshape(shape), flipped.q, kernel.q)
  zero = np.where(negative, flipped.zero, kernel.zero)
  return Kernel(np.where(dead.reshape(shape), zero.reshape(shape), q), zero, scale)


def is_int4(weight: Weight, form: Form) -> bool:
  """Whether a kernel is stored in 4 bits."""
  return form.int4 and weight.bits is not None and weight.bits <= 4


def stored(kernel: Kernel, weight: Weight, largest: int, form: Form) -> tuple[Any, Any]:
  """The kernel's integers and zero points in the type of the file.

  On x86 processors without VNNI, onnxruntime adds two products of uint8 and int8 in 16 bits and saturates silently. Two
  uint8 never saturate. So int8 is used only if the sum of two products fits.
  """
  if is_int4(weight, form):
    import ml_dtypes

    q, zero = kernel.q, kernel.zero
    if q.min() < -8 or q.max() > 7:
      # Unsigned 4-bit levels with an integer zero point: shift them into int4.
      low = q.reshape(len(q), -1).min(1)
      zero = -8 - low
      q = q + zero.reshape((-1,) + (1,) * (q.ndim - 1))
    if q.min() >= -8 and q.max() <= 7 and zero.min() >= -8 and zero.max() <= 7:
      return q.astype(ml_dtypes.int4), zero.astype(ml_dtypes.int4)
  safe = largest * 2 * int(np.abs(kernel.q).max(initial=0)) <= _INT16_MAX
  if form.int8_only or safe:
    return kernel.q.astype(np.int8), kernel.zero.astype(np.int8)
  return (kernel.q + 128).astype(np.uint8), (kernel.zero + 128).astype(np.uint8)


def refined(kernel: Kernel, largest: int, form: Form) -> Kernel:
  """The same values as larger integers with a smaller scale, to which the bias is then rounded.

  With few bits the products' scale is coarse, and a bias rounded to it moves many activations to another level.
  """
  top = int(np.abs(kernel.q).max(initial=0))
  if kernel.zero.any() or top == 0:
    return kernel
  limit = 127 if form.int8_only else min(127, _INT16_MAX // (2 * max(largest, 1)))
  factor = 1
  while 2 * factor * top <= limit:
    factor *= 2
  return Kernel(kernel.q * factor, kernel.zero, (kernel.scale / np.float32(factor)).astype(np.float32))


def _post(node: Node, features: int) -> tuple[np.ndarray, np.ndarray]:
  mul, add = node.attrs.get("post", (np.ones(features), np.zeros(features)))
  return np.broadcast_to(mul, (features,)), np.broadcast_to(add, (features,))


def _float_kernel(value: Value, permutation: tuple[int, ...]) -> np.ndarray:
  array = value.attrs["weight"].value if isinstance(value, Node) else value
  return np.asarray(array, np.float32).transpose(permutation)


def bias_name(builder: Builder, layer: str, add: np.ndarray, scale: np.ndarray | None) -> str | None:
  """The bias as int32 with the scale of the products (None: as float), or None if it does not fit."""
  if scale is None:
    return builder.constant(add.astype(np.float32), f"{layer}/bias")
  levels = np.round(add / scale.astype(np.float64))
  if np.abs(levels).max(initial=0) > np.iinfo(np.int32).max:
    return None
  inputs = [
    builder.constant(levels.astype(np.int32), f"{layer}/bias_q"),
    builder.constant(scale, f"{layer}/bias_scale"),
  ]
  return builder.op("DequantizeLinear", inputs, layer, axis=0)


class Written(NamedTuple):
  """A layer in the file: its result, how its weights are stored, and the name of its arithmetic."""

  value: Emitted
  weights: str
  how: str


def convolution(builder: Builder, node: Node, form: Form, *, rounded_next: bool) -> Written:
  """A convolution with the operations folded into it.

  Args:
    builder: of the file.
    node: `conv_general_dilated`.
    form: how layers are written.
    rounded_next: whether the result, or its ReLU, is only rounded to 8 bits next.

  Raises:
    KwjaxError: the convolution is transposed, or its kernel is computed from the images.
  """
  attrs, (x, kernel) = node.attrs, node.inputs
  spec = attrs["dimension_numbers"]
  if set(attrs["lhs_dilation"]) != {1} or attrs["batch_group_count"] != 1:
    raise refuse(node, "transposed convolutions are not supported")
  if isinstance(kernel, Node) and kernel.op != "weight":
    raise refuse(node, "its kernel depends on the images")
  if any(end < 0 for ends in attrs["padding"] for end in ends):
    raise refuse(node, "negative padding")
  options = {
    "strides": list(attrs["window_strides"]),
    "dilations": list(attrs["rhs_dilation"]),
    "pads": [int(ends[i]) for i in (0, 1) for ends in attrs["padding"]],
    "group": attrs["feature_group_count"],
  }
  layer, order, features = _name(node, kernel), tuple(spec.lhs_spec), node.shape[spec.out_spec[1]]
  mul, add = _post(node, features)
  integers = channels_first(kernel.attrs["weight"], tuple(spec.rhs_spec)) if isinstance(kernel, Node) else None
  rounded = x if isinstance(x, Node) and x.op == "quantize" else None
  if integers is None:
    name = builder.emitted(x, order).name  # type: ignore[arg-type]
    shaped = _float_kernel(kernel, tuple(spec.rhs_spec)) * mul.reshape((-1,) + (1,) * (len(spec.rhs_spec) - 1))
    inputs = [name, builder.constant(shaped.astype(np.float32), f"{layer}/kernel")]
    if add.any():
      inputs.append(builder.constant(add.astype(np.float32), f"{layer}/bias"))
    return Written(Emitted(builder.op("Conv", inputs, layer, **options), tuple(spec.out_spec)), "float32", "float")
  exact = rounded is not None and form.integer and options["group"] == 1 and not integers.zero.any()
  if exact:
    return _conv_integer(builder, node, integers, options, layer)
  whole = folded(integers, mul)
  rest = (mul, add)
  if whole is not None:
    rest = (np.ones(features), add)
  kernel_used, weight = whole or integers, kernel.attrs["weight"]  # type: ignore[union-attr]
  rounds_bias = rounded is not None and rounded_next and not is_int4(weight, form)
  if rounded is not None and rounds_bias:
    kernel_used = refined(kernel_used, rounded.attrs["levels"] - 1, form)
  name, weights = _dequantized(builder, kernel_used, weight, rounded, form, layer, axis=0)
  inputs = [builder.emitted(x, order).name, name]  # type: ignore[arg-type]
  if whole is not None and add.any():
    products = rounded.attrs["scale"] * kernel_used.scale if rounded is not None and rounds_bias else None
    bias = bias_name(builder, layer, add, products)
    if bias is not None:
      inputs.append(bias)
      rest = (rest[0], np.zeros(features))
  value = Emitted(builder.op("Conv", inputs, layer, **options), tuple(spec.out_spec))
  value = value._replace(name=scale_and_shift(builder, node, value, *rest, spec.out_spec[1]))
  separate = " with BatchNorm apart" if (rest[0] != 1).any() or rest[1].any() else ""
  return Written(value, weights, ("Q/DQ" if rounded is not None else "float, weights dequantized") + separate)


def _name(node: Node, kernel: Value) -> str:
  return kernel.attrs["weight"].layer if isinstance(kernel, Node) else node.scope


def _dequantized(
  builder: Builder, kernel: Kernel, weight: Weight, x: Node | None, form: Form, layer: str, *, axis: int
) -> tuple[str, str]:
  """The kernel behind a DequantizeLinear: `(name, type)`; output channels are moved to `axis`."""
  largest = 0 if x is None else x.attrs["levels"] - 1
  q, zero = stored(kernel, weight, largest, form)
  q = np.moveaxis(q, 0, axis)
  parts = ((q, "kernel_q"), (kernel.scale, "kernel_scale"), (zero, "kernel_zero"))
  inputs = [builder.constant(value, f"{layer}/{part}") for value, part in parts]
  return builder.op("DequantizeLinear", inputs, layer, axis=axis), str(q.dtype)


def _conv_integer(builder: Builder, node: Node, kernel: Kernel, options: dict[str, Any], layer: str) -> Written:
  """ConvInteger, then one multiplication and addition for each channel. Kernels are uint8, which is fast."""
  x, spec = node.inputs[0], node.attrs["dimension_numbers"]
  assert isinstance(x, Node)
  mul, add = _post(node, node.shape[spec.out_spec[1]])
  source = builder.quantized(x, tuple(spec.lhs_spec))
  q = builder.constant((kernel.q + 128).astype(np.uint8), f"{layer}/kernel_q")
  zero = builder.constant(np.uint8(128), f"{layer}/kernel_zero")
  products = builder.op("ConvInteger", [source.q.name, q, source.zero, zero], layer, **options)
  value = Emitted(builder.op("Cast", [products], layer, to=1), tuple(spec.out_spec))
  scale = x.attrs["scale"].astype(np.float64) * kernel.scale * mul
  name = scale_and_shift(builder, node, value, scale, add, spec.out_spec[1])
  return Written(value._replace(name=name), "uint8", "ConvInteger")


def dense(builder: Builder, node: Node, form: Form) -> Written:
  """A dense layer: Gemm for rows f32[b,k], else MatMul; its kernel i8[k,d]."""
  x, kernel = node.inputs
  layer, features = _name(node, kernel), node.shape[-1]
  mul, add = _post(node, features)
  integers = channels_first(kernel.attrs["weight"], (1, 0)) if isinstance(kernel, Node) else None
  whole = folded(integers, mul) if integers is not None else None
  rounded, rounds_bias = x if isinstance(x, Node) and x.op == "quantize" else None, False
  order: Order = tuple(range(node.rank))
  name, bias = builder.emitted(x, order).name, None  # type: ignore[arg-type]
  if whole is None:
    weights, how = "float32", "float"
    used = builder.constant((_float_kernel(kernel, (0, 1)) * mul).astype(np.float32), f"{layer}/kernel")
  else:
    weight = kernel.attrs["weight"]  # type: ignore[union-attr]
    rounds_bias = rounded is not None and not is_int4(weight, form)
    if rounded is not None and rounds_bias:
      whole = refined(whole, rounded.attrs["levels"] - 1, form)
    used, weights = _dequantized(builder, whole, weight, rounded, form, layer, axis=1)
    how = "Q/DQ" if rounded is not None else "float, weights dequantized"
  if node.rank == 2 and add.any():
    products = (
      rounded.attrs["scale"] * whole.scale if rounded is not None and whole is not None and rounds_bias else None
    )
    bias = bias_name(builder, layer, add, products)
  if node.rank == 2:
    value = Emitted(builder.op("Gemm", [name, used, *([bias] if bias else [])], layer), order)
  else:
    value = Emitted(builder.op("MatMul", [name, used], layer), order)
  if bias is None:
    value = value._replace(name=scale_and_shift(builder, node, value, np.ones(features), add, node.rank - 1))
  return Written(value, weights, how)
