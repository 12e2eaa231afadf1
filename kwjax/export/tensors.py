"""A quantized network as one safetensors file: integers, scales and what stays float, for a runtime of one's own."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from kwjax import intercept
from kwjax.errors import KwjaxError, RuleError, WeightsError
from kwjax.export.trace import weights_of
from kwjax.network import Array, Network, flatten_variables
from kwjax.quantization.fake_quant import fake_quant
from kwjax.quantization.grids import activation_grid
from kwjax.quantization.integer import QTensor
from kwjax.quantization.wrap import QuantizedNetwork, kernel_path

FORMAT = "kwjax-integer-1"
_META = "kwjax"
_INPUT_FIELDS = ("input_scale", "input_zero", "input_levels")


class IntegerNetwork(NamedTuple):
  """What a file of `export_safetensors` holds.

  Attributes:
    weights: `{layer: QTensor}`: kernel = (q - zero) * scale.
    inputs: `{layer: (scale, zero, levels)}`: its input x is rounded to (q - zero) * scale with
      q = clip(round(x / scale + zero), 0, levels - 1).
    floats: everything else, `{"params/.../bias": f32, "batch_stats/.../mean": f32, ...}`.
    description: name, rules, image shape, normalisation and architecture.
  """

  weights: Mapping[str, QTensor]
  inputs: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
  floats: Mapping[str, np.ndarray]
  description: Mapping[str, Any]


def export_safetensors(
  network: QuantizedNetwork, path: str | pathlib.Path, *, allow_float_weights: bool = False
) -> IntegerNetwork:
  """Write integer kernels, activation grids and all that stays float into one file; returns what it holds.

  `LAYER/q` i8, `LAYER/scale` f32, `LAYER/zero` i32 with value (q - zero) * scale; `LAYER/input_scale` f32,
  `LAYER/input_zero` i32, `LAYER/input_levels` i32; the other variables under their paths (`params/...`, `batch_stats/...`).

  Args:
    network: quantized.
    path: of the file; its folder must exist.
    allow_float_weights: write kernels without an integer form as float instead of refusing them.

  Raises:
    RuleError: a layer's weight scheme has no integer form.
    KwjaxError: the file cannot be written.
  """
  from kwjax.runtime.files import atomic_write

  floats, weights = flatten_variables(network.variables), {}
  for key, weight in weights_of(network).items():
    if weight.integer is not None:
      weights[weight.layer] = weight.integer
      del floats["/".join(("params", *key))]
    elif weight.bits is not None and not allow_float_weights:
      raise RuleError(f"layer {weight.layer} of {network.name} has no integer weights: {weight.reason}")
    else:
      floats["/".join(("params", *key))] = weight.value
  inputs = {}
  for layer, rule in network.rules.resolve(network.network).items():
    if rule.activation_bits is not None:
      grid = activation_grid(*network.ranges[layer], rule.activation_bits)
      scale, zero = np.asarray(grid.scale, np.float32), np.asarray(grid.zero).astype(np.int32)
      inputs[layer] = (scale, zero, np.asarray(grid.qmax + 1, np.int32))
  base = network.network
  description = {
    "name": network.name,
    "rules": network.rules.to_json(),
    "image_shape": list(base.image_shape),
    "input_mean": list(base.input_mean),
    "input_std": list(base.input_std),
    "arch": base.arch,
    "model_options": dict(base.model_options),
  }
  arrays = dict(floats)
  for layer, tensor in weights.items():
    arrays.update({f"{layer}/{field}": np.asarray(getattr(tensor, field)) for field in QTensor._fields})
  for layer, values in inputs.items():
    arrays.update({f"{layer}/{field}": value for field, value in zip(_INPUT_FIELDS, values, strict=True)})
  content = {name: np.array(value, order="C") for name, value in arrays.items()}
  payload = safetensors.numpy.save(content, {"format": FORMAT, _META: json.dumps(description)})
  try:
    atomic_write(pathlib.Path(path), payload)
  except OSError as error:
    raise KwjaxError(f"cannot write {path}: {error.strerror or error}") from error
  return IntegerNetwork(weights, inputs, floats, description)


def load_safetensors(path: str | pathlib.Path) -> IntegerNetwork:
  """Read a file of `export_safetensors`.

  Raises:
    WeightsError: the file cannot be read, is damaged or is another one.
  """
  path = pathlib.Path(path)
  try:
    with safetensors.safe_open(str(path), "numpy") as file:
      metadata = file.metadata() or {}
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
  except (OSError, safetensors.SafetensorError) as error:
    raise WeightsError(f"{path} is not a safetensors file: {str(error)[:100]}") from error
  if metadata.get("format") != FORMAT:
    raise WeightsError(f"{path} has format {metadata.get('format')}, this version reads {FORMAT}")
  try:
    description = json.loads(metadata[_META])
    layers = [name.removesuffix("/q") for name in arrays if name.endswith("/q")]
    weights = {
      layer: QTensor(*(arrays.pop(f"{layer}/{field}") for field in QTensor._fields)) for layer in sorted(layers)
    }
    rounded = [name.removesuffix("/input_scale") for name in arrays if name.endswith("/input_scale")]
    inputs = {layer: tuple(arrays.pop(f"{layer}/{field}") for field in _INPUT_FIELDS) for layer in sorted(rounded)}
  except (KeyError, ValueError) as error:
    raise WeightsError(f"{path} is damaged: {error}") from error
  return IntegerNetwork(weights, inputs, arrays, description)  # type: ignore[arg-type]


def run_integer(stored: IntegerNetwork, network: Network, images: Array) -> Array:
  """Logits of what a file holds, with the module of `network` and nothing else of it; for layers that nn.scan does not stack.

  Args:
    stored: of `load_safetensors`.
    network: the float network whose module and normalisation are used.
    images: f32[b,h,w,c] in [0,1].

  Returns:
    f32[b,k].
  """
  flat = {tuple(name.split("/")): jnp.asarray(value) for name, value in stored.floats.items()}
  for layer, tensor in stored.weights.items():
    flat[("params", *kernel_path(layer))] = QTensor(*(jnp.asarray(field) for field in tensor)).dequantize()

  def handle(module: Any, x: Array, proceed: Any) -> Any:
    scale, zero, levels = stored.inputs[intercept.layer_name(module)]
    return proceed(fake_quant(x, scale, zero.astype(np.float32), 0, int(levels) - 1))

  selected = set(stored.inputs)
  apply = intercept.intercept(network.forward, lambda module: intercept.layer_name(module) in selected, handle)
  return apply(flax.traverse_util.unflatten_dict(flat), images)[0]
