"""Measure BatchNorm statistics in a forward pass, and choose which statistics each layer uses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from kwjax import intercept
from kwjax.batchnorm.moments import Moments, batch_moments, over_devices, pool
from kwjax.batchnorm.normalize import feature_axis, normalize, running_moments
from kwjax.errors import KwjaxError, NoBatchNormError
from kwjax.network import ApplyFn, Array, Network, Variables
from kwjax.runtime.devices import parallel

INPUT = "input"
"""Name of the virtual layer whose statistics are the data set's mean and standard deviation."""

Mode = Literal["running", "current", "frozen"]
"""running: the running statistics. current: those of the batch. frozen: moments that the caller gives."""

_MOMENTS = "moments"
_FROZEN = "frozen_moments"
_WEIGHTS = "image_weights"


def matches(layer: str, patterns: Iterable[str]) -> bool:
  """Whether a layer's path equals a pattern, or a pattern as a regular expression matches all of it."""
  return any(layer == pattern or re.fullmatch(pattern, layer) for pattern in patterns)


def observing(
  apply: ApplyFn,
  *,
  axis_name: str | None = None,
  current: Sequence[str] = (),
  record_moments: bool = True,
) -> ApplyFn:
  """Wrap `apply`: record the moments of every BatchNorm input, and normalize with the chosen statistics.

  y = (x - mean) / sqrt(var + eps) * scale + bias, with the layer's eps, scale and bias, in float32. It runs here and not in
  the layer, whose mode its caller has fixed. If the variables come from `weigh`, the moments of the batch are weighted.

  Args:
    apply: what to wrap.
    axis_name: mapped axis over whose devices the statistics of `current` layers are averaged, one collective for each
      layer. Other layers record this device's moments; `over_devices` pools all of them at once.
    current: paths or regular expressions of the layers that use the statistics of the batch; "" matches none, ".*" all.
      Layers with moments from `freeze` use those. The others use the running statistics.
    record_moments: whether to store moments for `recorded_moments`.
  """

  def handle(module: nn.Module, x: Array, proceed: Callable[[Array], Array]) -> Array:
    assert isinstance(module, nn.BatchNorm)
    name = intercept.layer_name(module)
    running = running_moments(module)
    frozen = intercept.provided(module, _FROZEN)
    use_current = frozen is None and matches(name, current)
    moments = None
    if record_moments or use_current:
      moments = batch_moments(
        x,
        feature_axis=feature_axis(module),
        shift=running.mean,
        axis_name=axis_name if use_current else None,
        weights=_entry_weights(module, x),
      )
    if record_moments:
      intercept.record(module, _MOMENTS, moments)
    chosen = moments if use_current else frozen if frozen is not None else running
    assert chosen is not None
    return normalize(module, x, chosen, of_batch=use_current)

  return intercept.intercept(apply, lambda module: isinstance(module, nn.BatchNorm), handle)


def freeze(variables: Variables, moments: Mapping[str, Moments]) -> Variables:
  """Attach moments to layers. Under `observing`, these layers normalize with them on any batch.

  Args:
    variables: of a network.
    moments: `{layer: Moments}` as `observe` returns them; all parts `path[i]` of a stacked layer, or none.

  Raises:
    KwjaxError: a name is not a BatchNorm layer, or parts of a stacked layer are missing.
  """
  statistics = flax.traverse_util.flatten_dict(dict(variables.get("batch_stats", {})), sep="/")
  parts: dict[str, dict[int, Moments]] = {}
  for name, value in moments.items():
    path, _, index = name.partition("[")
    parts.setdefault(path, {})[int(index.rstrip("]")) if index else -1] = value
  attached = {}
  for path, values in parts.items():
    mean = statistics.get("mean" if path == "<top>" else f"{path}/mean")
    if mean is None:
      raise KwjaxError(f"there is no BatchNorm layer {path!r} to freeze")
    if mean.ndim == 1:
      attached[path] = values[-1]
      continue
    count = int(np.prod(mean.shape[:-1]))
    if -1 not in values and sorted(values) != list(range(count)):
      raise KwjaxError(f"layer {path} is a stack of {count}: freeze all of {path}[0] to {path}[{count - 1}], or none")
    stacked = values[-1] if -1 in values else Moments(*(jnp.stack(v) for v in zip(*(values[i] for i in range(count)))))
    attached[path] = Moments(*(v.reshape(mean.shape) for v in stacked))
  return intercept.provide(variables, _FROZEN, attached)


def weigh(variables: Variables, weights: Array) -> Variables:
  """Attach image weights to every BatchNorm layer. Under `observing`, statistics of the batch are then weighted means.

  A batch of any size can thus be padded to one that divides over the devices: padding has weight zero. If a layer's
  leading axis is k times the batch, as with patches, each weight goes to k consecutive entries. The axis must then run
  image by image.

  Args:
    variables: of a network.
    weights: f32[v] >= 0 of the images on this device: 1 counts, 0 is padding.

  Raises:
    KwjaxError: in the forward pass, if a layer's leading axis is no multiple of v.
  """
  weights = jnp.asarray(weights, jnp.float32)
  statistics = flax.traverse_util.flatten_dict(dict(variables.get("batch_stats", {})))
  attached = {
    # All axes of the statistics come first, so that nn.scan can slice a stack along any axis.
    "/".join(path[:-1]) or "<top>": jnp.broadcast_to(weights, (*mean.shape, weights.shape[0]))
    for path, mean in statistics.items()
    if path[-1] == "mean"
  }
  return intercept.provide(variables, _WEIGHTS, attached) if attached else variables


def _entry_weights(module: nn.BatchNorm, x: Array) -> Array | None:
  """Weights f32 of the entries of a layer's leading axis, or None without image weights."""
  attached = intercept.provided(module, _WEIGHTS)
  if attached is None:
    return None
  return entry_weights(module, x, attached[0], runs_over_images=feature_axis(module) % x.ndim != 0)


def entry_weights(module: nn.Module, x: Array, weights: Array, *, runs_over_images: bool = True) -> Array:
  """Weights f32[b] of the entries of the leading axis of x [b, ...] from those of the images.

  Args:
    module: the layer that x goes into or comes from.
    x: its leading axis is k times the number of images, and runs image by image.
    weights: f32[v] of the images of this device: 1 counts, 0 is padding.
    runs_over_images: whether the leading axis can be that of the images at all.

  Raises:
    KwjaxError: the leading axis is no multiple of v.
  """
  size, count = x.shape[0], weights.shape[-1]
  if not runs_over_images or weights.ndim != 1 or x.ndim < 2 or size % count:
    raise KwjaxError(
      f"layer {intercept.layer_name(module)} has an input of shape {tuple(x.shape)}, whose leading axis does not run over "
      f"the {count} images of a padded batch: use a batch size that is a multiple of the number of devices"
    )
  return weights if size == count else jnp.repeat(weights, size // count)


def recorded_moments(mutated: Variables) -> dict[str, Moments]:
  """Moments that `observing` recorded, `{layer: Moments f32[c]}`; layers under nn.scan are named `path[i]`.

  A layer that was called several times gets the moments over all its inputs.
  """
  found: dict[str, Moments] = {}
  for name, calls in intercept.collect(mutated, _MOMENTS).items():
    found.update(_unstack(name, pool(calls)))
  return found


def _unstack(name: str, moments: Moments) -> dict[str, Moments]:
  if moments.mean.ndim == 1:
    return {name: moments}
  mean, var = (m.reshape(-1, m.shape[-1]) for m in moments)
  return {f"{name}[{i}]": Moments(mean[i], var[i]) for i in range(mean.shape[0])}


def input_moments(
  images: Array, network: Network, *, axis_name: str | None = None, weights: Array | None = None
) -> Moments:
  """Moments f32[c] of images f32[b,h,w,c] in [0,1], with weights f32[b] or None: the virtual layer `input`."""
  shift = jnp.asarray(network.input_mean, jnp.float32)
  return batch_moments(images, shift=shift, axis_name=axis_name, weights=weights)


def observe(
  network: Network,
  images: Array,
  *,
  axis_name: str | None = None,
  current: Sequence[str] = (),
  include_input: bool = False,
  weights: Array | None = None,
) -> tuple[Array, dict[str, Moments]]:
  """Logits, and the moments of every BatchNorm input, of one batch in evaluation mode.

  Args:
    network: any network with `nn.BatchNorm`, float or quantized.
    images: f32[b,h,w,c] in [0,1].
    axis_name: mapped axis over whose devices the moments are taken.
    current: paths or regular expressions of the layers that use the statistics of the batch.
    include_input: add the images' own moments as the layer `input`.
    weights: f32[b], 1 for an image that counts and 0 for padding, or None: all count.

  Returns:
    logits f32[b,k] and `{layer: Moments f32[c]}` in execution order.

  Raises:
    NoBatchNormError: the network has no BatchNorm.
    KwjaxError: `current` matches no layer, or the leading axis of a layer's input does not fit the weights.
  """
  variables = network.variables if weights is None else weigh(network.variables, weights)
  logits, mutated = observing(network.forward, axis_name=axis_name, current=current)(variables, images)
  moments = recorded_moments(mutated)
  if not moments:
    raise no_batch_norm(network.name)
  names = intercept.batch_norm_layers(_float(network))
  unknown = [pattern for pattern in current if not any(matches(name, [pattern]) for name in names)]
  if unknown:
    raise KwjaxError(f"no BatchNorm layer of {network.name} matches {unknown}; there are {', '.join(names[:8])}, ...")
  moments = intercept.in_order(moments, names)
  if include_input:
    moments = {INPUT: input_moments(images, network, weights=weights), **moments}
  return logits, over_devices(moments, axis_name, share=parallel.weight_share(weights, axis_name))


def reference_moments(network: Network, *, include_input: bool = False) -> dict[str, Moments]:
  """The running statistics of every BatchNorm layer, `{layer: Moments f32[c]}` in execution order.

  Args:
    network: any network with `nn.BatchNorm`.
    include_input: add the data set's mean and variance, in [0,1] pixel units, as the layer `input`.

  Raises:
    NoBatchNormError: the network has no BatchNorm.
  """
  network = _float(network)
  stats = flax.traverse_util.flatten_dict(dict(network.variables.get("batch_stats", {})), sep="/")
  names = intercept.batch_norm_layers(network)
  if not names:
    raise no_batch_norm(network.name)
  found: dict[str, Moments] = {}
  if include_input:
    found[INPUT] = Moments(jnp.asarray(network.input_mean), jnp.square(jnp.asarray(network.input_std)))
  for name in names:
    prefix = "" if name == "<top>" else f"{name}/"
    found.update(_unstack(name, Moments(stats[f"{prefix}mean"], stats[f"{prefix}var"])))
  return found


def _float(network: Network) -> Network:
  """The float network behind a quantized one."""
  return getattr(network, "network", network)


def no_batch_norm(name: str) -> NoBatchNormError:
  """The error for a network without BatchNorm: it names the schemes that still work."""
  return NoBatchNormError(
    f"network {name} has no BatchNorm layer, and so no statistics to synthesize from or to compare with: "
    'use the schemes that need none, "gaussian" (G) or "inception" (I)'
  )
