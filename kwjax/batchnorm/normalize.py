"""BatchNorm's own arithmetic, outside of the layer: with stored moments, and with those of the batch."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kwjax import intercept
from kwjax.batchnorm.moments import Moments, batch_moments
from kwjax.errors import KwjaxError
from kwjax.network import Array


def feature_axis(module: nn.BatchNorm) -> int:
  """The axis that is kept, as the layer states it.

  Raises:
    KwjaxError: there are several.
  """
  if isinstance(module.axis, (tuple, list)):
    raise KwjaxError(
      f"layer {intercept.layer_name(module)} normalizes over several feature axes {module.axis}; one is supported"
    )
  return module.axis


def _along_features(module: nn.BatchNorm, x: Array) -> tuple[int, ...]:
  """The shape with which a value a channel is broadcast to x."""
  axis = feature_axis(module) % x.ndim
  return tuple(size if i == axis else 1 for i, size in enumerate(x.shape))


def running_moments(module: nn.BatchNorm) -> Moments:
  """The stored statistics of a bound BatchNorm layer, as they are (PyTorch's variance is the unbiased one); f32[c]."""
  return Moments(module.get_variable("batch_stats", "mean"), module.get_variable("batch_stats", "var"))


def normalize(module: nn.BatchNorm, x: Array, moments: Moments, near_zero: bool = False) -> Array:
  """(x - mean) / sqrt(var + eps) * scale + bias with the layer's own eps, scale, bias and result type; like x.

  Where the mean is near zero, the gradient may be made of sums of x instead of x - mean.
  """
  shape = _along_features(module, x)
  multiplier = jax.lax.rsqrt(moments.var + module.epsilon)
  scale = module.get_variable("params", "scale") if module.use_scale else None
  bias = module.get_variable("params", "bias") if module.use_bias else None
  dtype = module.dtype or jnp.result_type(x, *(p for p in (scale, bias) if p is not None))
  if scale is not None:
    multiplier = multiplier * scale
  mean, multiplier = moments.mean.reshape(shape), multiplier.reshape(shape)
  y = _standardized(x, mean, multiplier) if near_zero else (x - mean) * multiplier
  if bias is not None:
    y = y + bias.reshape(shape)
  return jnp.asarray(y, dtype)


def normalize_by_batch(
  module: nn.BatchNorm, x: Array, shift: Array, axis_name: str | None, weights: Array | None
) -> tuple[Array, Moments]:
  """`normalize` with the moments of the batch, and those moments, by way of x - shift, a constant near the mean taken off.

  XLA's CPU backend writes to memory what it sums over pixels. x - shift serves the variance, the result and both gradients
  (0.94 of the time of MobileNetV2's step of fine-tuning); x - mean would be a further array, kept for the backward pass.
  """
  shape, shift = _along_features(module, x), jax.lax.stop_gradient(shift)
  centred = x - shift.reshape(shape)
  moments = batch_moments(x, feature_axis=feature_axis(module), shift=shift, axis_name=axis_name, weights=weights)
  return normalize(module, centred, Moments(moments.mean - shift, moments.var), near_zero=True), moments


@jax.custom_jvp
def _standardized(x: Array, mean: Array, multiplier: Array) -> Array:
  """(x - mean) * multiplier, for a mean near zero."""
  return (x - mean) * multiplier


@_standardized.defjvp
def _standardized_jvp(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
  """The tangent dx m - (dmean m + mean dm) + x dm: its transpose sums g and g x, neither of
  which needs x - mean in memory.
  """
  (x, mean, multiplier), (dx, dmean, dmultiplier) = primals, tangents
  constant = dmean * multiplier + mean * dmultiplier
  return _standardized(x, mean, multiplier), dx * multiplier + x * dmultiplier - constant
