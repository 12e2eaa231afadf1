"""Runs a network in simulated low precision: wrappers of its forward pass, and `QuantizedNetwork`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from kwjax import intercept
from kwjax.errors import KwjaxError
from kwjax.network import ApplyFn, Array, Network, Variables
from kwjax.quantization.fake_quant import fake_quant
from kwjax.quantization.grids import Clip, Grid, Spacing, activation_grid, fixed_grid, weight_grid
from kwjax.quantization.ranges import Ranges
from kwjax.quantization.rules import LayerRule, QuantRules
from kwjax.quantization.weight_ranges import (
  WeightClips,
  WeightGrids,
  channel_axes,
  check_clips,
  check_grids,
  kernel_path,
  weight_clips,
)

_RANGE = "activation_range"


def kernel_grid(
  kernel: Array, layer: intercept.Layer, rule: LayerRule, clip: Clip | None = None, spacing: Spacing | None = None
) -> Grid:
  """The grid of each output channel of a layer's kernel; nn.scan can stack kernels along leading axes.

  Args:
    kernel: of the layer.
    layer: gives the channels' axes.
    rule: bits and weight scheme.
    clip: shares of the range that are clipped, or None.
    spacing: scales and zero points that do not follow the kernel, or None.

  Raises:
    RuleError: the kernel is stacked along another axis than the first.
  """
  assert rule.weight_bits is not None
  assert rule.weight_scheme is not None
  if spacing is not None:
    return fixed_grid(spacing, rule.weight_scheme, rule.weight_bits)
  return weight_grid(kernel, rule.weight_scheme, rule.weight_bits, axes=channel_axes(kernel, layer), clip=clip)


def quantize_weights(
  apply: ApplyFn,
  network: Network,
  rules: QuantRules,
  clips: Mapping[str, Clip] | None = None,
  grids: Mapping[str, Spacing] | None = None,
) -> ApplyFn:
  """Wrap `apply`: round kernels to their grid, which follows the kernel's values at every call unless it is given.

  Gradients reach the float kernels through the straight-through estimator.

  Args:
    apply: what to wrap.
    network: the float network, for its layers.
    rules: bits of each layer.
    clips: of `weight_clips`, constants; other layers keep the whole range of their weights.
    grids: scales and zero points of layers whose grid does not follow the kernel.
  """
  layers = {layer.name: layer for layer in intercept.matmul_layers(network)}
  chosen = {name: rule for name, rule in rules.resolve(network).items() if rule.weight_bits is not None}

  def wrapped(variables: Variables, images: Array) -> tuple[Array, Variables]:
    params = flax.traverse_util.flatten_dict(dict(variables["params"]))
    for name, rule in chosen.items():
      kernel = params[kernel_path(name)]
      grid = kernel_grid(kernel, layers[name], rule, (clips or {}).get(name), (grids or {}).get(name))
      params[kernel_path(name)] = fake_quant(kernel, *grid)
    return apply({**variables, "params": flax.traverse_util.unflatten_dict(params)}, images)

  return wrapped


def quantize_inputs(apply: ApplyFn, network: Network, rules: QuantRules, ranges: Ranges) -> ApplyFn:
  """Wrap `apply`: round the input of every convolution and dense layer to the levels of its calibrated range.

  Args:
    apply: what to wrap.
    network: the float network, for its layers.
    rules: bits of each layer.
    ranges: `{layer: (lo, hi)}`, constants without a gradient.

  Raises:
    KwjaxError: when called, if a lifted transform does not pass a layer its range.
  """
  bits = {
    name: rule.activation_bits for name, rule in rules.resolve(network).items() if rule.activation_bits is not None
  }

  def handle(module: nn.Module, x: Array, proceed: Any) -> Any:
    name = intercept.layer_name(module)
    interval = intercept.provided(module, _RANGE)
    if interval is None or jnp.ndim(interval.lo) != 0:
      raise KwjaxError(
        f"the activation range of layer {name} does not reach it: its lifted transform does not pass on the "
        "batch_stats collection (give nn.scan or nn.vmap variable_axes={'batch_stats': 0})"
      )
    return proceed(fake_quant(x, *activation_grid(interval.lo, interval.hi, bits[name])))

  intercepted = intercept.intercept(apply, lambda module: intercept.layer_name(module) in bits, handle)

  def wrapped(variables: Variables, images: Array) -> tuple[Array, Variables]:
    return intercepted(intercept.provide(variables, _RANGE, {name: ranges[name] for name in bits}), images)

  return wrapped


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedNetwork:
  """A network in simulated low precision, used like a `Network`; a pytree of its float variables and its ranges.

  Invariant: biases, BatchNorm and residual additions are float. `variables` are float and rounded at every call.
  A layer in `grids` has a grid of its own; that of every other layer follows its weights.

  Attributes:
    network: the float network that holds the weights.
    rules: bits of every layer.
    ranges: activation range of every layer with quantized inputs.
    clips: clipped shares of each layer's weight range; empty unless `rules.weights_range` is "mse". They are constants:
      in distillation the grids follow the weights and keep the shares.
    grids: scale and zero point of layers whose grid does not follow the weights, such as those of `reconstruct`.
  """

  network: Network
  rules: QuantRules
  ranges: Ranges
  clips: WeightClips = dataclasses.field(default_factory=dict)
  grids: WeightGrids = dataclasses.field(default_factory=dict)

  def tree_flatten(self) -> tuple[tuple[Network, Ranges, WeightClips, WeightGrids], QuantRules]:
    """Children: the network, the ranges, the clips and the grids. The rules are static."""
    return (self.network, self.ranges, self.clips, self.grids), self.rules

  @classmethod
  def tree_unflatten(
    cls, rules: QuantRules, children: tuple[Network, Ranges, WeightClips, WeightGrids]
  ) -> QuantizedNetwork:
    """Rebuild from children, which can be placeholders."""
    return cls(children[0], rules, *children[1:])

  def forward(self, variables: Variables, images: Array) -> tuple[Array, Variables]:
    """Logits f32[b,k] of images f32[b,h,w,c] in [0,1], and recorded values; gradients pass through the rounding.

    Args:
      variables: of the float network.
      images: f32[b,h,w,c] in [0,1].
    """
    apply = quantize_inputs(self.network.forward, self.network, self.rules, self.ranges)
    return quantize_weights(apply, self.network, self.rules, self.clips, self.grids)(variables, images)

  def apply(self, images: Array | np.ndarray) -> Array:
    """Logits f32[b,k] of images f32[b,h,w,c] in [0,1], in evaluation mode."""
    return self.forward(self.variables, jnp.asarray(images))[0]

  def replace(self, **changes: Any) -> QuantizedNetwork:
    """The same with some fields of it or of its float network (`variables`, ...) changed."""
    own = {field.name for field in dataclasses.fields(self)}
    inner = {name: value for name, value in changes.items() if name not in own}
    outer = {name: value for name, value in changes.items() if name in own}
    copy = dataclasses.replace(self, **outer)
    return dataclasses.replace(copy, network=copy.network.replace(**inner)) if inner else copy

  @property
  def variables(self) -> Variables:
    """Float variables."""
    return self.network.variables

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """`(h, w, c)` of one image."""
    return self.network.image_shape

  @property
  def input_mean(self) -> Sequence[float]:
    """Mean of the training data for each channel, in [0, 1] pixel units."""
    return self.network.input_mean

  @property
  def input_std(self) -> Sequence[float]:
    """Standard deviation for each channel, same units."""
    return self.network.input_std

  @property
  def name(self) -> str:
    """Name of the float network and bits: "resnet44 4w4a"."""
    return f"{self.network.name} {self.rules.bits}"

  @property
  def num_classes(self) -> int:
    """Number of logits."""
    return self.network.num_classes


def quantize(
  network: Network,
  rules: QuantRules,
  ranges: Ranges,
  *,
  clips: WeightClips | None = None,
  grids: WeightGrids | None = None,
) -> QuantizedNetwork:
  """The network in simulated low precision, with given rules and calibrated ranges.

  Args:
    network: the float network.
    rules: bits of every layer.
    ranges: of `calibrate`; layers with float inputs need none.
    clips: of `weight_clips`; None: computed here if `rules.weights_range` is "mse".
    grids: scales and zero points of layers whose grid does not follow the weights.

  Raises:
    RuleError: a rule matches no layer.
    KwjaxError: a layer's range is missing, has another shape than the layer's stack, or is empty or not finite.
  """
  resolved = rules.resolve(network)
  needed = [name for name, rule in resolved.items() if rule.activation_bits is not None]
  missing = [name for name in needed if name not in ranges]
  if missing:
    raise KwjaxError(
      f"no calibrated range for {len(missing)} of {len(needed)} layers of {network.name}: {', '.join(missing)}"
    )
  repeats = {layer.name: layer.repeats for layer in intercept.matmul_layers(network)}
  for name in needed:
    lo, hi = (np.asarray(end) for end in ranges[name])
    if lo.shape != hi.shape or lo.size != repeats[name]:
      raise KwjaxError(
        f"the range of layer {name} needs {repeats[name]} pairs of ends, found ends of shapes {lo.shape} and {hi.shape}"
      )
    if not (np.isfinite(lo).all() and np.isfinite(hi).all()) or (lo > hi).any():
      raise KwjaxError(f"the range of layer {name} must be finite with lowest <= highest, found {lo} to {hi}")
  clips = weight_clips(network, rules) if clips is None else clips
  check_clips(network, resolved, clips, complete=rules.weights_range != "minmax")
  check_grids(network, resolved, grids or {})
  return QuantizedNetwork(network, rules, ranges, clips, dict(grids or {}))
