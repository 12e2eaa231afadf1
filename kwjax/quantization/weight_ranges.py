"""Clipping of weight ranges: the shares of each output channel with the least squared error."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeVar

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from kwjax import intercept
from kwjax.errors import RuleError
from kwjax.network import Array, Network
from kwjax.quantization.fake_quant import fake_quant
from kwjax.quantization.grids import Clip, Spacing, weight_grid
from kwjax.quantization.rules import LayerRule, QuantRules

WeightClips = dict[str, Clip]
"""`{layer: Clip}`; other layers keep their whole range."""

WeightGrids = dict[str, Spacing]
"""`{layer: Spacing}`; the grids of other layers follow their weights."""

T = TypeVar("T")

_LARGEST_CUT = 0.48
_STEPS = 49
_ROUNDS = 3
_TWO_ENDED = ("affine", "affine0")


class _Found(NamedTuple):
  error: Array
  lo: Array
  hi: Array


def kernel_path(layer: str) -> tuple[str, ...]:
  """Path of a layer's kernel in the flattened parameters."""
  return (*(() if layer == "<top>" else layer.split("/")), "kernel")


def channel_axes(kernel: Array, layer: intercept.Layer) -> tuple[int, ...]:
  """The axes of a kernel inside one output channel; nn.scan can stack kernels along leading axes.

  Raises:
    RuleError: the kernel is stacked along another axis than the first.
  """
  assert layer.kernel_shape is not None
  stacked = kernel.ndim - len(layer.kernel_shape)
  if stacked < 0 or kernel.shape[stacked:] != layer.kernel_shape:
    raise RuleError(
      f"the kernel of layer {layer.name} has shape {kernel.shape}, expected {layer.kernel_shape} "
      "with stacked layers along leading axes (give nn.scan or nn.vmap variable_axes={'params': 0})"
    )
  channels = {axis % kernel.ndim for axis in layer.channel_axes}
  return tuple(axis for axis in range(stacked, kernel.ndim) if axis not in channels)


@functools.partial(jax.jit, static_argnames=("scheme", "bits", "axes"))
def mse_clip(weights: Array, scheme: str, bits: int, *, axes: tuple[int, ...]) -> Clip:
  r"""The shares to clip from each channel's range for the least $\sum_w (w - Q(w))^2$.

  The search goes from 0 to 0.48 in steps of 0.01: first both ends alike, then, for schemes with two free ends, each end in
  turn, three times. It can miss the best pair of shares. No channel's error is greater than without clipping.

  Args:
    weights: kernel, any float type.
    scheme: a name in `WEIGHT_SCHEMES`.
    bits: 2 to 8.
    axes: the axes inside one channel.

  Returns:
    Clip, f32 of the kernel's rank with size 1 along `axes`, each in [0, 0.48].

  Source: Banner et al. (2019), arXiv:1810.05723, clipping; Nagel et al. (2021), arXiv:2106.08295, 3.1, the MSE criterion.
  """
  weights = weights.astype(jnp.float32)
  cuts = jnp.linspace(0.0, _LARGEST_CUT, _STEPS)

  def at(lo: Array, hi: Array) -> _Found:
    quantized = fake_quant(weights, *weight_grid(weights, scheme, bits, axes=axes, clip=Clip(lo, hi)))
    return _Found(jnp.sum(jnp.square(weights - quantized), axes, keepdims=True), lo, hi)

  def search(best: _Found, moves_lo: bool, moves_hi: bool) -> _Found:
    def try_cut(best: _Found, cut: Array) -> tuple[_Found, None]:
      cut = jnp.full_like(best.lo, cut)
      found = at(cut if moves_lo else best.lo, cut if moves_hi else best.hi)
      better = found.error < best.error
      return _Found(*(jnp.where(better, new, old) for new, old in zip(found, best, strict=True))), None

    return jax.lax.scan(try_cut, best, cuts)[0]

  none = jnp.zeros_like(jnp.sum(weights, axes, keepdims=True))
  best = search(at(none, none), True, True)
  for _ in range(_ROUNDS if scheme in _TWO_ENDED else 0):
    best = search(search(best, True, False), False, True)
  return Clip(best.lo, best.hi)


def weight_clips(network: Network, rules: QuantRules) -> WeightClips:
  """The clips of every quantized kernel for `rules.weights_range`: none for "minmax".

  Args:
    network: with the float weights.
    rules: bits, weight scheme and range of the weights.

  Returns:
    `{layer: Clip}` in execution order.

  Raises:
    RuleError: a rule matches no layer.
  """
  if rules.weights_range == "minmax":
    return {}
  params = flax.traverse_util.flatten_dict(dict(network.variables["params"]))
  layers = {layer.name: layer for layer in intercept.matmul_layers(network)}
  found = {}
  for name, rule in rules.resolve(network).items():
    if rule.weight_bits is not None and rule.weight_scheme is not None:
      kernel = jnp.asarray(params[kernel_path(name)])
      axes = channel_axes(kernel, layers[name])
      found[name] = mse_clip(kernel, rule.weight_scheme, rule.weight_bits, axes=axes)
  return found


def check_clips(network: Network, rules: Mapping[str, LayerRule], clips: WeightClips, *, complete: bool) -> None:
  """Refuse clips that do not fit this network's kernels.

  Args:
    network: with the float weights.
    rules: of `QuantRules.resolve`.
    clips: to check.
    complete: whether every layer with quantized weights needs one.

  Raises:
    RuleError: a layer is missing, unknown or float, or its shares have another shape or are not in [0, 0.5).
  """
  missing = [name for name, rule in rules.items() if rule.weight_bits is not None and name not in clips]
  if complete and missing:
    raise RuleError(f"weight clips are missing for {len(missing)} layers of {network.name}: {', '.join(missing[:5])}")
  for name, clip, expected in _with_shapes(network, rules, clips, "weight clips"):
    for end in clip:
      if tuple(end.shape) != expected or not ((np.asarray(end) >= 0) & (np.asarray(end) < 0.5)).all():
        raise RuleError(
          f"the weight clip of layer {name} needs shares in [0, 0.5) of shape {expected}, found shape {end.shape}"
        )


def check_grids(network: Network, rules: Mapping[str, LayerRule], grids: WeightGrids) -> None:
  """Refuse grids that do not fit this network's kernels.

  Args:
    network: with the float weights.
    rules: of `QuantRules.resolve`.
    grids: to check.

  Raises:
    RuleError: a layer is unknown or float, a scale is not positive, or a zero point not finite, or a shape is another.
  """
  for name, (scale, zero), expected in _with_shapes(network, rules, grids, "weight grids"):
    for what, value in (("scale", scale), ("zero", zero)):
      if tuple(np.shape(value)) != expected or not np.isfinite(value).all():
        raise RuleError(
          f"the weight grid of layer {name} needs a finite {what} of shape {expected}, found shape {np.shape(value)}"
        )
    if not (np.asarray(scale) > 0).all():
      raise RuleError(f"the weight grid of layer {name} needs positive scales, found {np.asarray(scale).min():g}")


def _with_shapes(
  network: Network, rules: Mapping[str, LayerRule], found: Mapping[str, T], what: str
) -> Iterator[tuple[str, T, tuple[int, ...]]]:
  """What is given for each layer, with the shape that its arrays need."""
  params = flax.traverse_util.flatten_dict(dict(network.variables["params"]))
  layers = {layer.name: layer for layer in intercept.matmul_layers(network)}
  for name, value in found.items():
    if name not in layers or rules[name].weight_bits is None:
      raise RuleError(f"{what} name {name}, which is no layer of {network.name} with quantized weights")
    kernel = params[kernel_path(name)]
    axes = channel_axes(kernel, layers[name])
    yield name, value, tuple(1 if axis in axes else size for axis, size in enumerate(kernel.shape))
