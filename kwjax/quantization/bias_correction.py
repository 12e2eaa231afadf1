"""Take back what quantization does to the mean, and to the variance, of every channel, measured on images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from kwjax import intercept
from kwjax.errors import KwjaxError
from kwjax.intercept import Forwardable
from kwjax.network import ApplyFn, Array, Network, Variables
from kwjax.quantization.calibrate import check_images
from kwjax.quantization.wrap import QuantizedNetwork
from kwjax.runtime.parallel import DeviceGroup, device_group
from kwjax.runtime.parallel import mean as over_devices

_MEANS = "channel_means"
_SHIFTS = "channel_shifts"


class _Moments(NamedTuple):
  mean: Array
  var: Array


class _Places(NamedTuple):
  """Where a constant can be taken off: inputs of BatchNorm layers, outputs of layers with a bias."""

  norms: frozenset[str]
  biased: frozenset[str]


def correct_bias(
  quantized: QuantizedNetwork,
  images: Array | np.ndarray,
  *,
  reference: Network | None = None,
  variance: bool = False,
  batch_size: int = 128,
  devices: int | Sequence[jax.Device] | DeviceGroup | None = None,
) -> QuantizedNetwork:
  r"""The copy whose channels have the float network's means on some images: empirical bias correction.

  $e_c = \mathrm{E}[\tilde y_c] - \mathrm{E}[y_c]$ is added to the running mean of the BatchNorm layer that takes $y$, or
  subtracted from the bias of the layer that gives it. With `variance` BatchNorm's running moments are changed so that its
  output has the float network's mean and variance: rounding also takes from the signal, and deep networks lose it.
  Layers are corrected one after the other within one forward pass of a batch: a layer's error is measured behind layers that
  are corrected already. Layers with neither BatchNorm nor bias keep their error.

  Args:
    quantized: the copy; its weights, grids and ranges stay as they are.
    images: f32[n,h,w,c] in [0,1], such as those of the calibration; what does not fill a whole batch is left out.
    reference: the network whose moments are wanted; default: the copy's own float weights.
    variance: whether BatchNorm's variances are corrected as well.
    batch_size: images whose mean is taken at once; over batches errors are averaged.
    devices: number of devices, devices, or None (all accelerators, or one CPU).

  Returns:
    The copy with other running moments and biases.

  Raises:
    DataError: there are no images, or they are unfit.
    KwjaxError: no layer has a bias or BatchNorm.

  Source: Nagel et al. (2019), "Data-Free Quantization through Weight Equalization and Bias Correction", arXiv:1906.04721, 4.2
  and appendix D; for the variance Sun et al. (2019), "Hybrid 8-bit Floating Point (HFP8) Training and Inference", 3.1, who
  tune BatchNorm's statistics after quantization.
  """
  reference = quantized.network if reference is None else reference
  check_images(reference, images)
  places = _places(reference)
  group = device_group(devices).local
  if len(images) < group.size:
    group = device_group(1)
  size = min(batch_size, len(images)) // group.size * group.size
  observe, compare = _compiled(group, places, variance)
  placed = group.replicate(quantized), group.replicate(reference)
  starts = range(0, len(images) - size + 1, size)
  total: dict[str, Any] = {}
  for start in starts:
    batch = group.shard(np.asarray(images[start : start + size], np.float32))
    with jax.default_matmul_precision("highest"):
      found = jax.tree.map(np.float64, group.first(compare(placed[0], batch, observe(placed[1], batch))))
    total = jax.tree.map(np.add, total, found) if total else found
  total = jax.tree.map(lambda value: value / len(starts), total)
  return quantized.replace(variables=_corrected(quantized.variables, total, places))


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


def recording_means(apply: ApplyFn, places: _Places, axis_name: str | None) -> ApplyFn:
  """Wrap `apply`: leave the moments of each BatchNorm's input and of each biased layer's output, over all devices."""

  def handle(module: nn.Module, x: Array, proceed: Any) -> Any:
    name = intercept.layer_name(module)
    if name in places.norms:
      intercept.record(module, _MEANS, _channel_moments(x, 1, axis_name))
      return proceed(x)
    y = proceed(x)
    intercept.record(module, _MEANS, _channel_moments(y, _bias_axes(module), axis_name))
    return y

  return intercept.intercept(apply, lambda module: _selected(module, places), handle)


def correcting_means(
  apply: ApplyFn, places: _Places, wanted: Mapping[str, _Moments], axis_name: str | None, *, variance: bool
) -> ApplyFn:
  """Wrap `apply`: give every channel its wanted moments, and leave the running moments or the shift of the bias that do so."""

  def handle(module: nn.Module, x: Array, proceed: Any) -> Any:
    wanted, is_norm = intercept.provided(module, _MEANS), intercept.layer_name(module) in places.norms
    if wanted is None:
      raise KwjaxError(
        f"the wanted means of layer {intercept.layer_name(module)} do not reach it: its lifted transform does not pass on the "
        "batch_stats collection (give nn.scan or nn.vmap variable_axes={'batch_stats': 0})"
      )
    if not is_norm:
      y = proceed(x)
      shift = _channel_moments(y, _bias_axes(module), axis_name).mean - wanted.mean
      intercept.record(module, _SHIFTS, shift)
      return y - shift.astype(y.dtype)
    assert isinstance(module, nn.BatchNorm)
    found, eps = _channel_moments(x, 1, axis_name), module.epsilon
    mean: Array = module.get_variable("batch_stats", "mean")
    var: Array = module.get_variable("batch_stats", "var")
    gain: Array | float = 1.0
    if variance:
      gain = jnp.sqrt((wanted.var + eps) / (found.var + eps))
      var = jnp.maximum((var + eps) / gain**2 - eps, 0.0)
    # Running moments with which BatchNorm does to x what it did to (x - found mean) * gain + wanted mean.
    moved = found.mean - (wanted.mean - mean) / gain
    intercept.record(module, _SHIFTS, _Moments(moved, var))
    return proceed(((x - found.mean) * gain + wanted.mean).astype(x.dtype))

  inner = intercept.intercept(apply, lambda module: _selected(module, places), handle)

  def wrapped(variables: Variables, images: Array) -> tuple[Array, Variables]:
    return inner(intercept.provide(variables, _MEANS, wanted), images)

  return wrapped


def _selected(module: nn.Module, places: _Places) -> bool:
  name = intercept.layer_name(module)
  return name in places.norms or name in places.biased


def _bias_axes(module: nn.Module) -> int:
  return module.get_variable("params", "bias").ndim


def _channel_moments(values: Array, kept: int, axis_name: str | None) -> _Moments:
  """Mean and variance over all but the last `kept` axes."""
  values, axes = values.astype(jnp.float32), tuple(range(values.ndim - kept))
  mean = over_devices(values.mean(axes), axis_name)
  return _Moments(mean, over_devices(jnp.square(values - mean).mean(axes), axis_name))


@functools.lru_cache(maxsize=8)
def _compiled(group: DeviceGroup, places: _Places, variance: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
  def observe(network: Forwardable, images: Array, axis_name: str | None) -> dict[str, Any]:
    _, mutated = recording_means(network.forward, places, axis_name)(network.variables, images)
    return _averages(intercept.collect(mutated, _MEANS))

  def compare(
    network: Forwardable, images: Array, wanted: Mapping[str, _Moments], axis_name: str | None
  ) -> dict[str, Any]:
    apply = correcting_means(network.forward, places, wanted, axis_name, variance=variance)
    _, mutated = apply(network.variables, images)
    return _averages(intercept.collect(mutated, _SHIFTS))

  return group.compile(observe), group.compile(compare)


def _averages(found: Mapping[str, list[Any]]) -> dict[str, Any]:
  """Over the calls of a layer that is used several times, which share their moments or bias."""
  return {name: jax.tree.map(lambda *values: sum(values) / len(values), *calls) for name, calls in found.items()}


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
