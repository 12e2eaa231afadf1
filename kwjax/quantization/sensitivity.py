"""Sensitivity of each layer to few bits: one layer is quantized at a time, and the logits are compared with the float ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from kwjax import intercept
from kwjax.errors import KwjaxError
from kwjax.network import Array, Network, Variables
from kwjax.quantization.calibrate import ranges_from
from kwjax.quantization.extremes import observe_ranges
from kwjax.quantization.fake_quant import fake_quant
from kwjax.quantization.grids import activation_grid
from kwjax.quantization.histograms import observe_histograms
from kwjax.quantization.range_methods import histogram_ranges
from kwjax.quantization.ranges import Ranges
from kwjax.quantization.rules import Bits, QuantRules
from kwjax.quantization.weight_ranges import kernel_path, mse_clip
from kwjax.quantization.wrap import kernel_grid
from kwjax.runtime.devices import processes
from kwjax.runtime.devices.forwarding import progress_bar
from kwjax.runtime.devices.parallel import Devices
from kwjax.runtime.evaluate import predict

_GRID = "allocation_grid"


class Sensitivity(NamedTuple):
  """What few bits in one layer alone cost.

  Attributes:
    weights: `{bits: KL in nats}` with this layer's kernel quantized and everything else float.
    activations: the same for its input.
    parameters: number of weights in its kernel.
    inputs: number of values it reads for one image.
  """

  weights: dict[int, float]
  activations: dict[int, float]
  parameters: int
  inputs: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Switched:
  """A network each of whose layers can have its input quantized; a `Classifier`."""

  network: Network
  grids: dict[str, Any]  # {layer: _switch(...)}

  @property
  def name(self) -> str:
    return self.network.name

  def apply(self, images: Array) -> Array:
    def handle(module: nn.Module, x: Array, proceed: Any) -> Any:
      switch = intercept.provided(module, _GRID)
      assert switch is not None
      return proceed(jnp.where(switch["on"], fake_quant(x, *switch["grid"]), x))

    apply = intercept.intercept(self.network.forward, lambda module: intercept.layer_name(module) in self.grids, handle)
    return apply(intercept.provide(self.network.variables, _GRID, self.grids), images)[0]


def measure_sensitivity(
  network: Network,
  images: Array | np.ndarray,
  candidates: Sequence[int],
  rules: QuantRules,
  *,
  key: Array,
  batch_size: int = 64,
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Sensitivity]:
  """KL(float || quantized) in nats, with the weights or the input of one layer quantized at a time.

  One program serves all layers and bits: kernels are rounded before it, and grids are its arguments.

  Args:
    network: the float network.
    images: f32[n,h,w,c] in [0,1].
    candidates: bits, 2 to 8.
    rules: weight scheme, and how ranges are read.
    key: PRNG key of the calibration's draws.
    batch_size: most images forwarded at a time.
    devices: number of devices per process, the devices, or None: all accelerators, or one CPU per process.
    progress: show a progress bar.
    should_stop: called after each batch; True ends the pass.

  Returns:
    `{layer: Sensitivity}` in execution order.

  Raises:
    KwjaxError: a layer is stacked by nn.scan.
    NonFiniteError: the network returns NaN or infinite logits.
    Interrupted: `should_stop` returned True, in any process.
  """
  layers = {layer.name: layer for layer in intercept.matmul_layers(network)}
  stacked = [name for name, layer in layers.items() if layer.repeats > 1]
  if stacked:
    raise KwjaxError(
      f"layer {stacked[0]} is stacked by nn.scan: its layers share one rule, so bits cannot be allocated"
    )
  where: dict[str, Any] = {"devices": devices, "should_stop": should_stop}
  ranges = _ranges_by_bits(network, images, candidates, rules, key, where)
  off = {name: _switch(None) for name in layers}

  def log_probabilities(variables: Variables, grids: dict[str, Any]) -> Array:
    switched = _Switched(network.replace(variables=variables), grids)
    return jax.nn.log_softmax(processes.gather(predict(switched, images, batch_size=batch_size, **where)))

  expected = log_probabilities(network.variables, off)

  def cost(variables: Variables, grids: dict[str, Any]) -> float:
    found = log_probabilities(variables, grids)
    return max(float(jnp.sum(jnp.exp(expected) * (expected - found), -1).mean()), 0.0)

  found = {}
  for name, layer in progress_bar(layers.items(), "sensitivity", unit="layer", total=len(layers), progress=progress):
    weights = {b: cost(_with_kernel(network, layer, b, rules), off) for b in candidates}
    inputs = {
      b: cost(network.variables, {**off, name: _switch(activation_grid(*ranges[b][name], b))}) for b in candidates
    }
    found[name] = Sensitivity(
      weights, inputs, math.prod(layer.kernel_shape or ()) * layer.repeats, math.prod(layer.input_shape[1:])
    )
  return found


def _ranges_by_bits(
  network: Network,
  images: Any,
  candidates: Sequence[int],
  rules: QuantRules,
  key: Array,
  where: Mapping[str, Any],
) -> dict[int, Ranges]:
  table = observe_ranges(network, images, **where)
  if not rules.needs_histograms:
    found = ranges_from(table, rules, key=key)
    return dict.fromkeys(candidates, found)
  histograms = observe_histograms(network, images, table, **where)
  by_bits = {b: dataclasses.replace(rules, bits=Bits(b, b), first_last=None, overrides=()) for b in candidates}
  return {b: histogram_ranges(histograms, own.resolve(network), own.ranges) for b, own in by_bits.items()}


def _switch(grid: Any | None) -> dict[str, Any]:
  """Grid of an input as arrays, and whether it is used."""
  values = (1.0, 0.0, 0.0, 1.0) if grid is None else grid
  return {"grid": [jnp.asarray(value, jnp.float32) for value in values], "on": jnp.asarray(grid is not None)}


def _with_kernel(network: Network, layer: intercept.Layer, bits: int, rules: QuantRules) -> Variables:
  """Variables with one layer's kernel rounded to its grid."""
  flat = flax.traverse_util.flatten_dict(dict(network.variables["params"]))
  kernel = jnp.asarray(flat[kernel_path(layer.name)])
  own = dataclasses.replace(rules, bits=Bits(bits, None), first_last=None, overrides=())
  rule = own.resolve(network)[layer.name]
  assert rule.weight_scheme is not None
  clip = None
  if rules.weights_range == "mse":
    axes = tuple(a for a in range(kernel.ndim) if a not in {c % kernel.ndim for c in layer.channel_axes})
    clip = mse_clip(kernel, rule.weight_scheme, bits, axes=axes)
  flat[kernel_path(layer.name)] = fake_quant(kernel, *kernel_grid(kernel, layer, rule, clip))
  return {**network.variables, "params": flax.traverse_util.unflatten_dict(flat)}
