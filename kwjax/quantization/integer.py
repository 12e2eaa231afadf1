"""Weights as integers for integer kernels and exporters, equal to the simulated weights."""

from __future__ import annotations

from typing import NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp

from kwjax import intercept
from kwjax.errors import RuleError
from kwjax.quantization.fake_quant import nearest_level
from kwjax.quantization.grids import Clip, Grid, Spacing
from kwjax.quantization.rules import LayerRule
from kwjax.quantization.wrap import QuantizedNetwork, kernel_grid, kernel_path

Array = jax.Array


class QTensor(NamedTuple):
  """An integer tensor. Invariant: value = (q - zero) * scale in float32, with scale > 0.

  Attributes:
    q: i8, the shape of the kernel.
    scale: f32, the kernel's rank, with size 1 on all axes except those of output channels and stacked layers.
    zero: i32, the shape of `scale`.
  """

  q: Array
  scale: Array
  zero: Array

  def dequantize(self) -> Array:
    """(q - zero) * scale, f32."""
    return (self.q.astype(jnp.int32) - self.zero).astype(jnp.float32) * self.scale


def why_not_integer(rule: LayerRule) -> str | None:
  """The reason why a layer's weights have no int8 form, or None if they have one."""
  if rule.weight_bits is None:
    return "its weights are float"
  if rule.weight_scheme == "affine":
    return "the scheme 'affine' has a real zero point (use 'affine0', 'sym', 'symfull' or 'midrise')"
  if rule.weight_scheme == "midrise" and rule.weight_bits == 8:
    return "the scheme 'midrise' at 8 bits needs odd integers from -255 to 255, beyond int8 (use 7 bits or 'symfull')"
  return None


def integer_kernel(
  kernel: Array, layer: intercept.Layer, rule: LayerRule, clip: Clip | None = None, spacing: Spacing | None = None
) -> QTensor:
  """The integer form of one kernel, equal to the kernel of the quantized forward pass.

  Raises:
    RuleError: the scheme's levels are not int8 integers.
  """
  reason = why_not_integer(rule)
  if reason is not None:
    raise RuleError(f"layer {layer.name} has no integer weights: {reason}")
  grid = kernel_grid(kernel, layer, rule, clip, spacing)
  level = jnp.clip(nearest_level(kernel, grid.scale, grid.zero), grid.qmin, grid.qmax).astype(jnp.int32)
  return _signed(level, grid, rule)


def _signed(level: Array, grid: Grid, rule: LayerRule) -> QTensor:
  if rule.weight_scheme == "midrise":
    # (k - n/2) * s = (2k - n) * (s/2); halving a float is exact.
    return QTensor((2 * level - grid.qmax).astype(jnp.int8), grid.scale / 2, jnp.zeros_like(grid.zero, jnp.int32))
  # Shift unsigned levels and the zero point by half of the number of levels.
  shift = 2 ** (int(rule.weight_bits or 0) - 1) if grid.qmin == 0 else 0
  return QTensor((level - shift).astype(jnp.int8), grid.scale, grid.zero.astype(jnp.int32) - shift)


def _kernels(
  quantized: QuantizedNetwork,
) -> dict[str, tuple[Array, intercept.Layer, LayerRule, Clip | None, Spacing | None]]:
  layers = {layer.name: layer for layer in intercept.matmul_layers(quantized.network)}
  params = flax.traverse_util.flatten_dict(dict(quantized.variables["params"]))
  rules = quantized.rules.resolve(quantized.network)
  return {
    name: (params[kernel_path(name)], layers[name], rule, quantized.clips.get(name), quantized.grids.get(name))
    for name, rule in rules.items()
    if rule.weight_bits is not None
  }


def integer_weights(quantized: QuantizedNetwork) -> dict[str, QTensor]:
  """Integer kernels `{layer: QTensor}` of every layer with quantized weights, in execution order.

  `dequantize()` gives the kernels of `.apply`, bit for bit, except for the sign of zero: integers have one zero.

  Raises:
    RuleError: a layer's weight scheme has no int8 form (`affine`, with its real zero point; `midrise` at 8 bits).
  """
  return {name: integer_kernel(*kernel) for name, kernel in _kernels(quantized).items()}


def representable_weights(quantized: QuantizedNetwork) -> dict[str, QTensor]:
  """As `integer_weights`, without the layers that have no int8 form."""
  kernels = _kernels(quantized)
  return {name: integer_kernel(*kernel) for name, kernel in kernels.items() if why_not_integer(kernel[2]) is None}
