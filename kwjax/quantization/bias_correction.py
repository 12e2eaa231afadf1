"""Correct what quantization does to the mean and the variance of every channel, measured on images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kwjax import intercept
from kwjax.batchnorm import entry_weights
from kwjax.batchnorm.normalize import feature_axis
from kwjax.errors import KwjaxError
from kwjax.network import ApplyFn, Array, Network, Variables
from kwjax.quantization.extremes import check_images
from kwjax.quantization.wrap import QuantizedNetwork
from kwjax.runtime.devices.forwarding import check_batch_size, forward_batches
from kwjax.runtime.devices.parallel import Devices, weight_share
from kwjax.runtime.devices.parallel import mean as over_devices

_MEANS = "channel_means"
_SHIFTS = "channel_shifts"


class _Moments(NamedTuple):
  mean: Array
  var: Array


class _Sample(NamedTuple):
  """The images that means are taken over: their weights f32[b] on this device, or None, and the mapped axis, or None."""

  weights: Array | None
  axis_name: str | None


class _Places(NamedTuple):
  """Where a constant can be subtracted: inputs of BatchNorm layers, outputs of layers with a bias."""

  norms: frozenset[str]
  biased: frozenset[str]


def correct_bias(
  quantized: QuantizedNetwork,
  images: Array | np.ndarray,
  *,
  reference: Network | None = None,
  variance: bool = False,
  batch_size: int = 128,
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> QuantizedNetwork:
  r"""The student with the float network's channel means on some images: empirical bias correction.

  $e_c = \mathrm{E}[\tilde y_c] - \mathrm{E}[y_c]$ is added to the running mean of the BatchNorm layer that takes $y$, or
  subtracted from the bias of the layer that gives it. With `variance` BatchNorm's running moments are changed so that its
  output has the float network's mean and variance: rounding also weakens the signal, most of all in deep networks.

  Layers are corrected in order within one forward pass of a batch, so a layer's error is measured behind corrected layers.
  Layers with neither BatchNorm nor bias keep their error, and so do layers that are called several times: no single shift
  suits several inputs.

  Args:
    quantized: the student; its weights, grids and ranges stay as they are.
    images: f32[n,h,w,c] in [0,1], such as the calibration set.
    reference: the network whose moments are wanted; default: the student's own float weights, which a reconstructed student
      does not have.
    variance: whether BatchNorm's variances are corrected as well.
    batch_size: most images over which a mean is taken. Batches are as equal as possible; errors are averaged over images.
    devices: number of devices per process, the devices, or None: all accelerators, or one CPU per process.
    progress: show a progress bar.
    should_stop: called after each batch; True ends the pass.

  Returns:
    The student with other running moments and biases.

  Raises:
    DataError: there are no images, or they do not fit the network.
    KwjaxError: no layer that is called once has a bias or BatchNorm; or a reconstructed student comes without `reference`.
    Interrupted: `should_stop` returned True, in any process.

  Source: Nagel et al. (2019), "Data-Free Quantization through Weight Equalization and Bias Correction", arXiv:1906.04721, 4.2
  and appendix D; for the variance Sun et al. (2019), "Hybrid 8-bit Floating Point (HFP8) Training and Inference", 3.1, who
  tune BatchNorm's statistics after quantization.
  """
  if reference is None and quantized.grids:
    raise KwjaxError(
      f"{quantized.name} is reconstructed: its weights are rounded already, so pass the float network as reference="
    )
  reference = quantized.network if reference is None else reference
  check_images(reference, images)
  check_batch_size(batch_size)
  places = _places(reference)
  batches = forward_batches(
    _compare,
    # An argument of the program, so that one program serves both corrections.
    (quantized, reference, jnp.asarray(variance)),
    images,
    batch_size=batch_size,
    description="bias correction",
    devices=devices,
    progress=progress,
    should_stop=should_stop,
    options={"places": places},
  )
  # The shifts are equal on all devices.
  parts, counts = zip(*((jax.tree.map(lambda shift: np.float64(shift[0]), found), n) for found, n in batches))
  total = jax.tree.map(lambda *values: np.average(values, axis=0, weights=counts), *parts)
  return quantized.replace(variables=_corrected(quantized.variables, total, places))


def _compare(
  placed: tuple[QuantizedNetwork, Network, Array],
  images: Array,
  weights: Array | None,
  axis_name: str | None,
  places: _Places,
) -> dict[str, Any]:
  """How far every channel has to be shifted; over all devices."""
  (quantized, reference, variance), sample = placed, _Sample(weights, axis_name)
  with jax.default_matmul_precision("highest"):
    _, mutated = recording_means(reference.forward, places, sample)(reference.variables, images)
    recorded = intercept.collect(mutated, _MEANS)
    once = {name: calls[0] for name, calls in recorded.items() if len(calls) == 1}
    if not once:
      several = ", ".join(recorded)
      why = f"each layer with a bias or BatchNorm is called several times ({several})"
      raise KwjaxError(f"the bias of {reference.name} cannot be corrected: {why}")
    places = _Places(places.norms & once.keys(), places.biased & once.keys())
    # Two programs in one: XLA shall not mix them.
    images, wanted = lax.optimization_barrier((images, once))
    _, mutated = correcting_means(quantized.forward, places, wanted, sample, variance=variance)(
      quantized.variables, images
    )
  return {name: shift for name, (shift,) in intercept.collect(mutated, _SHIFTS).items()}


def _places(network: Network) -> _Places:
  params = flax.traverse_util.flatten_dict(dict(network.variables["params"]), sep="/")
  biased = frozenset(
    layer.name for layer in intercept.matmul_layers(network) if _path(layer.name, "bias", "/") in params
  )
  found = _Places(frozenset(intercept.batch_norm_layers(network)), biased)
  if not any(found):
    raise KwjaxError(f"the bias of {network.name} cannot be corrected: no layer has a bias or BatchNorm")
  return found


def _path(layer: str, leaf: str, separator: str) -> str:
  return leaf if layer == "<top>" else f"{layer}{separator}{leaf}"


def recording_means(apply: ApplyFn, places: _Places, sample: _Sample) -> ApplyFn:
  """Wrap `apply`: record the moments of each BatchNorm's input and of each biased layer's output."""

  def handle(module: nn.Module, x: Array, proceed: Any) -> Any:
    name = intercept.layer_name(module)
    if name in places.norms:
      intercept.record(module, _MEANS, _channel_moments(module, _channels_last(module, x), 1, sample))
      return proceed(x)
    y = proceed(x)
    intercept.record(module, _MEANS, _channel_moments(module, y, _bias_axes(module), sample))
    return y

  return intercept.intercept(apply, lambda module: _selected(module, places), handle)


def correcting_means(
  apply: ApplyFn, places: _Places, wanted: Mapping[str, _Moments], sample: _Sample, *, variance: Array
) -> ApplyFn:
  """Wrap `apply`: give every channel its wanted mean, and variance where that is true, and record the running moments or the
  bias shift that do so.
  """

  def handle(module: nn.Module, x: Array, proceed: Any) -> Any:
    wanted, is_norm = intercept.provided(module, _MEANS), intercept.layer_name(module) in places.norms
    if wanted is None:
      raise KwjaxError(
        f"the wanted means of layer {intercept.layer_name(module)} do not reach it: its lifted transform does not pass on the "
        "batch_stats collection (give nn.scan or nn.vmap variable_axes={'batch_stats': 0})"
      )
    if not is_norm:
      y = proceed(x)
      shift = _channel_moments(module, y, _bias_axes(module), sample).mean - wanted.mean
      intercept.record(module, _SHIFTS, shift)
      return y - shift.astype(y.dtype)
    assert isinstance(module, nn.BatchNorm)
    axis, x = feature_axis(module), _channels_last(module, x)
    found, eps = _channel_moments(module, x, 1, sample), module.epsilon
    mean: Array = module.get_variable("batch_stats", "mean")
    var: Array = module.get_variable("batch_stats", "var")
    gain = jnp.where(variance, jnp.sqrt((wanted.var + eps) / (found.var + eps)), 1.0)
    var = jnp.where(variance, jnp.maximum((var + eps) / gain**2 - eps, 0.0), var)
    # Running moments with which BatchNorm does to x what it did to (x - found mean) * gain + wanted mean.
    moved = found.mean - (wanted.mean - mean) / gain
    intercept.record(module, _SHIFTS, _Moments(moved, var))
    return proceed(jnp.moveaxis(((x - found.mean) * gain + wanted.mean).astype(x.dtype), -1, axis))

  inner = intercept.intercept(apply, lambda module: _selected(module, places), handle)

  def wrapped(variables: Variables, images: Array) -> tuple[Array, Variables]:
    return inner(intercept.provide(variables, _MEANS, wanted), images)

  return wrapped


def _selected(module: nn.Module, places: _Places) -> bool:
  name = intercept.layer_name(module)
  return name in places.norms or name in places.biased


def _channels_last(module: nn.Module, x: Array) -> Array:
  """The input of a BatchNorm layer with its channels along the last axis."""
  assert isinstance(module, nn.BatchNorm)
  return jnp.moveaxis(x, feature_axis(module), -1)


def _bias_axes(module: nn.Module) -> int:
  return module.get_variable("params", "bias").ndim


def _channel_moments(module: nn.Module, values: Array, kept: int, sample: _Sample) -> _Moments:
  """Mean and variance of values [b, ...] over all but the last `kept` axes, over the images of all devices."""
  values, axes = values.astype(jnp.float32), tuple(range(values.ndim - kept))
  if sample.weights is None:
    mean = over_devices(values.mean(axes), sample.axis_name)
    return _Moments(mean, over_devices(jnp.square(values - mean).mean(axes), sample.axis_name))
  weights = entry_weights(module, values, sample.weights)
  weights = (weights / jnp.maximum(weights.sum(), 1.0)).reshape(-1, *[1] * (values.ndim - 1))
  share = weight_share(sample.weights, sample.axis_name)

  def average(entries: Array) -> Array:
    by_image = entries.mean(axes[1:], keepdims=True)
    return over_devices((weights * by_image).sum(axes), sample.axis_name, share)

  mean = average(values)
  return _Moments(mean, average(jnp.square(values - mean)))


def _corrected(variables: Variables, found: Mapping[str, Any], places: _Places) -> dict[str, Any]:
  flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")

  def put(path: str, value: np.ndarray) -> None:
    flat[path] = jnp.asarray(value.reshape(flat[path].shape), flat[path].dtype)

  for name, value in found.items():
    if name in places.norms:
      put(f"batch_stats/{_path(name, 'mean', '/')}", value.mean)
      put(f"batch_stats/{_path(name, 'var', '/')}", value.var)
    else:
      path = f"params/{_path(name, 'bias', '/')}"
      put(path, np.asarray(flat[path], np.float64) - value.reshape(flat[path].shape))
  return {**variables, **flax.traverse_util.unflatten_dict(flat, sep="/")}
