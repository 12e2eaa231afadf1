"""The JAX program of a network's forward pass, with a mark where an activation is quantized."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import export

from kwjax import intercept, kernels
from kwjax.errors import KwjaxError
from kwjax.export.graph import Weight
from kwjax.network import Array, Network, Variables
from kwjax.quantization.fake_quant import fake_quant
from kwjax.quantization.grids import Clip, Spacing
from kwjax.quantization.integer import QTensor, integer_kernel, why_not_integer
from kwjax.quantization.rules import LayerRule
from kwjax.quantization.wrap import QuantizedNetwork, kernel_grid, kernel_path

_RANGE = "export_range"
FLOAT = LayerRule(None, None, None)

quantize_p = jax.extend.core.Primitive("kwjax_quantize")
"""`(x, lo f32[], hi f32[]; layer, bits) -> like x`: marks in the traced program where a layer's input is rounded."""
quantize_p.def_abstract_eval(lambda x, lo, hi, **_: x)


def float_network(network: Network | QuantizedNetwork) -> Network:
  """The float network inside, with the modules and variables."""
  return network.network if isinstance(network, QuantizedNetwork) else network


def rules_of(network: Network | QuantizedNetwork) -> dict[str, LayerRule]:
  """The rule of every convolution and dense layer in execution order; float throughout for a float network."""
  if isinstance(network, QuantizedNetwork):
    return network.rules.resolve(network.network)
  return {layer.name: FLOAT for layer in intercept.matmul_layers(network)}


def trace(network: Network | QuantizedNetwork, batch: int | None) -> tuple[Any, Variables]:
  """The program of the forward pass, and the variables that are its first arguments.

  Args:
    network: float or quantized.
    batch: number of images, or None for a symbolic number.

  Returns:
    `(ClosedJaxpr, variables)`: the arguments are `jax.tree.leaves(variables)`, then the images f32[b,h,w,c].

  Raises:
    KwjaxError: the module cannot be traced with an unknown number of images.
  """
  base, rules = float_network(network), rules_of(network)
  intercept.layers(base)  # refuses BatchNorm in training mode
  bits = {name: rule.activation_bits for name, rule in rules.items() if rule.activation_bits is not None}

  def handle(module: nn.Module, x: Array, proceed: Any) -> Any:
    name = intercept.layer_name(module)
    interval = intercept.provided(module, _RANGE)
    if interval is None:
      raise KwjaxError(f"the activation range of layer {name} does not reach it: its lifted transform drops it")
    return proceed(quantize_p.bind(x, *interval, layer=name, bits=bits[name]))

  apply = intercept.intercept(base.forward, lambda module: intercept.layer_name(module) in bits, handle)
  variables = dict(base.variables)
  if isinstance(network, QuantizedNetwork):
    variables = intercept.provide(variables, _RANGE, {name: network.ranges[name] for name in bits})
  count = export.symbolic_shape("batch")[0] if batch is None else batch
  images = jax.ShapeDtypeStruct((count, *base.image_shape), jnp.float32)
  try:
    # The fast forms for CPUs are many operations each.
    with kernels.enabled(False), jax.default_matmul_precision("highest"):
      return jax.make_jaxpr(lambda v, x: apply(v, x)[0])(variables, images), variables
  except jax.errors.InconclusiveDimensionOperation as error:
    reason = str(error).splitlines()[0]
    raise KwjaxError(
      f"{base.name} cannot be traced for any number of images, name one with batch=: {reason}"
    ) from error


def weights_of(network: Network | QuantizedNetwork) -> dict[tuple[str, ...], Weight]:
  """Every kernel as the network uses it, by its path in the flattened parameters."""
  base, rules = float_network(network), rules_of(network)
  params = flax.traverse_util.flatten_dict(dict(base.variables.get("params", {})))
  clips, grids = (network.clips, network.grids) if isinstance(network, QuantizedNetwork) else ({}, {})
  found = {}
  for layer in intercept.matmul_layers(base):
    kernel, rule = params[kernel_path(layer.name)], rules[layer.name]
    # Layers of one shape share a program.
    alike = dataclasses.replace(layer, name="", input_shape=(), output_shape=())
    spacing = grids.get(layer.name)
    value, integer = jax.tree.map(np.asarray, _rounded(kernel, alike, rule, clips.get(layer.name), spacing))
    found[kernel_path(layer.name)] = Weight(layer.name, value, integer, why_not_integer(rule) or "", rule.weight_bits)
  return found


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rounded(
  kernel: Array, layer: intercept.Layer, rule: LayerRule, clip: Clip | None, spacing: Spacing | None
) -> tuple[Array, QTensor | None]:
  if rule.weight_bits is None:
    return kernel, None
  value = fake_quant(kernel, *kernel_grid(kernel, layer, rule, clip, spacing))
  return value, None if why_not_integer(rule) else integer_kernel(kernel, layer, rule, clip, spacing)
