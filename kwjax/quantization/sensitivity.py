"""How much each layer minds few bits: one layer quantized at a time, the answers compared with the float network's."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from kwjax import intercept
from kwjax.errors import KwjaxError
from kwjax.network import Array, Network, Variables
from kwjax.quantization.calibrate import observe_ranges, ranges_from
from kwjax.quantization.fake_quant import fake_quant
from kwjax.quantization.grids import activation_grid
from kwjax.quantization.histograms import observe_histograms
from kwjax.quantization.range_methods import histogram_ranges
from kwjax.quantization.ranges import Ranges
from kwjax.quantization.rules import Bits, QuantRules
from kwjax.quantization.weight_ranges import kernel_path, mse_clip
from kwjax.quantization.wrap import kernel_grid
from kwjax.runtime.parallel import DeviceGroup, device_group

_GRID = "allocation_grid"


class Sensitivity(NamedTuple):
  """What few bits of one layer alone cost.

  Attributes:
    weights: `{bits: KL in nats}` with this layer's kernel quantized and all else float.
    activations: the same for its input.
    parameters: weights in its kernel.
    inputs: values it reads for one image.
  """

  weights: dict[int, float]
  activations: dict[int, float]
  parameters: int
  inputs: int


def measure_sensitivity(
  network: Network,
  images: Array | np.ndarray,
  candidates: Sequence[int],
  rules: QuantRules,
  *,
  key: Array,
  batch_size: int = 64,
  progress: bool = False,
  devices: int | Sequence[jax.Device] | DeviceGroup | None = None,
) -> dict[str, Sensitivity]:
  """KL(float || copy) in nats, with one layer's weights or one layer's input quantized at a time.

  One program serves all layers and bits: kernels are rounded before it, and grids are its arguments.

  Args:
    network: the float network.
    images: f32[n,h,w,c] in [0,1].
    candidates: bits, 2 to 8.
    rules: how weights and ranges are read.
    key: of the draws of the calibration.
    batch_size: images forwarded at a time.
    progress: show a bar.
    devices: number of devices, devices, or None.

  Returns:
    `{layer: Sensitivity}` in execution order.

  Raises:
    KwjaxError: a layer is stacked by nn.scan.
  """
  group = device_group(devices).local
  group = group if len(images) >= group.size else device_group(1)
  layers = {layer.name: layer for layer in intercept.matmul_layers(network)}
  stacked = [name for name, layer in layers.items() if layer.repeats > 1]
  if stacked:
    raise KwjaxError(
      f"layer {stacked[0]} is stacked by nn.scan: its layers share one rule, so bits cannot be allocated"
    )
  ranges = _ranges_by_bits(network, images, candidates, rules, key, group)
  off = {name: _switch(None) for name in layers}
  batches = _batches(images, batch_size, group.size)
  forward = _compiled_logits(group, tuple(layers))

  def logits(variables: Variables, grids: Mapping[str, Any]) -> np.ndarray:
    placed = group.replicate_constants((network.replace(variables=variables), grids))
    return np.concatenate([group.unshard(forward(placed, group.shard(batch))) for batch in batches])

  expected = jax.nn.log_softmax(logits(network.variables, off))

  def cost(variables: Variables, grids: Mapping[str, Any]) -> float:
    found = jax.nn.log_softmax(logits(variables, grids))
    return max(float(jnp.sum(jnp.exp(expected) * (expected - found), -1).mean()), 0.0)

  found = {}
  for name, layer in tqdm(layers.items(), desc="sensitivity", unit="layer", disable=not progress):
    weights = {b: cost(_with_kernel(network, layer, b, rules), off) for b in candidates}
    inputs = {
      b: cost(network.variables, {**off, name: _switch(activation_grid(*ranges[b][name], b))}) for b in candidates
    }
    found[name] = Sensitivity(
      weights, inputs, math.prod(layer.kernel_shape or ()) * layer.repeats, math.prod(layer.input_shape[1:])
    )
  return found


def _batches(images: Array | np.ndarray, batch_size: int, devices: int) -> list[np.ndarray]:
  """As equal as possible: two shapes to compile at most. Only what fills no share of every device is left out."""
  shares, parts = len(images) // devices, max(1, math.ceil(len(images) / max(batch_size, devices)))
  edges = [devices * (shares * i // parts) for i in range(parts + 1)]
  return [np.asarray(images[start:end], np.float32) for start, end in itertools.pairwise(edges) if end > start]


def _ranges_by_bits(
  network: Network, images: Any, candidates: Sequence[int], rules: QuantRules, key: Array, group: DeviceGroup
) -> dict[int, Ranges]:
  table = observe_ranges(network, images, devices=group)
  if not rules.needs_histograms:
    found = ranges_from(table, rules, key=key)
    return dict.fromkeys(candidates, found)
  histograms = observe_histograms(network, images, table, devices=group)
  by_bits = {b: dataclasses.replace(rules, bits=Bits(b, b), first_last=None, overrides=()) for b in candidates}
  return {b: histogram_ranges(histograms, own.resolve(network), own.ranges) for b, own in by_bits.items()}


def _switch(grid: Any | None) -> dict[str, Any]:
  """Grid of an input as arrays, and whether it is used at all."""
  values = (1.0, 0.0, 0.0, 1.0) if grid is None else grid
  return {"grid": [jnp.asarray(value, jnp.float32) for value in values], "on": jnp.asarray(grid is not None)}


def _with_kernel(network: Network, layer: intercept.Layer, bits: int, rules: QuantRules) -> Variables:
  """Variables with one layer's kernel rounded to its grid."""
  flat = flax.traverse_util.flatten_dict(dict(network.variables["params"]))
  kernel = jnp.asarray(flat[kernel_path(layer.name)])
  own = dataclasses.replace(rules, bits=Bits(bits, None), first_last=None, overrides=())
  rule = own.resolve(network)[layer.name]
  assert rule.weight_reading is not None
  clip = None
  if rules.weights_range == "mse":
    axes = tuple(a for a in range(kernel.ndim) if a not in {c % kernel.ndim for c in layer.channel_axes})
    clip = mse_clip(kernel, rule.weight_reading, bits, axes=axes)
  flat[kernel_path(layer.name)] = fake_quant(kernel, *kernel_grid(kernel, layer, rule, clip))
  return {**network.variables, "params": flax.traverse_util.unflatten_dict(flat)}


@functools.lru_cache(maxsize=8)
def _compiled_logits(group: DeviceGroup, names: tuple[str, ...]) -> Callable[..., Array]:
  chosen = frozenset(names)

  def handle(module: nn.Module, x: Array, proceed: Any) -> Any:
    switch = intercept.provided(module, _GRID)
    assert switch is not None
    return proceed(jnp.where(switch["on"], fake_quant(x, *switch["grid"]), x))

  def logits(placed: tuple[Network, dict[str, Any]], images: Array, axis_name: str | None) -> Array:
    network, grids = placed
    apply = intercept.intercept(network.forward, lambda module: intercept.layer_name(module) in chosen, handle)
    return apply(intercept.provide(network.variables, _GRID, grids), images)[0]

  return group.compile(logits)
