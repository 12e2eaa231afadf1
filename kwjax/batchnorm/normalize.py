"""BatchNorm's arithmetic outside the layer, with running statistics or those of the batch."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kwjax import intercept
from kwjax.batchnorm.moments import Moments
from kwjax.errors import KwjaxError
from kwjax.network import Array


def feature_axis(module: nn.BatchNorm) -> int:
  """The feature axis of a layer.

  Raises:
    KwjaxError: there are several.
  """
  if isinstance(module.axis, (tuple, list)):
    raise KwjaxError(
      f"layer {intercept.layer_name(module)} normalizes over several feature axes {module.axis}; one is supported"
    )
  return module.axis


def _along_features(module: nn.BatchNorm, x: Array) -> tuple[int, ...]:
  """The shape that broadcasts one value for each channel to x."""
  axis = feature_axis(module) % x.ndim
  return tuple(size if i == axis else 1 for i, size in enumerate(x.shape))


def running_moments(module: nn.BatchNorm) -> Moments:
  """The running statistics of a bound BatchNorm layer, unchanged (PyTorch's variance is unbiased); f32[c]."""
  return Moments(module.get_variable("batch_stats", "mean"), module.get_variable("batch_stats", "var"))


def normalize(module: nn.BatchNorm, x: Array, moments: Moments, *, of_batch: bool = False) -> Array:
  """(x - mean) / sqrt(var + eps) * scale + bias with the layer's eps, scale, bias and result type; like x.

  `of_batch`: the moments have a gradient. The result is the same.
  """
  shape = _along_features(module, x)
  multiplier = jax.lax.rsqrt(moments.var + module.epsilon)
  scale = module.get_variable("params", "scale") if module.use_scale else None
  bias = module.get_variable("params", "bias") if module.use_bias else None
  dtype = module.dtype or jnp.result_type(x, *(p for p in (scale, bias) if p is not None))
  if scale is not None:
    multiplier = multiplier * scale
  mean, multiplier = moments.mean.reshape(shape), multiplier.reshape(shape)
  y = _standardized(x, mean, multiplier) if of_batch else (x - mean) * multiplier
  if bias is not None:
    y = y + bias.reshape(shape)
  return jnp.asarray(y, dtype)


@jax.custom_jvp
def _standardized(x: Array, mean: Array, multiplier: Array) -> Array:
  """(x - mean) * multiplier."""
  return (x - mean) * multiplier


@_standardized.defjvp
def _standardized_jvp(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
  """The tangent dx m - dmean m + (x - mean) dm.

  x + (-mean) equals x - mean bit for bit. XLA sees a separate array and computes it inside the sum, without storing it.
  """
  (x, mean, multiplier), (dx, dmean, dmultiplier) = primals, tangents
  y = _standardized(x, mean, multiplier)
  return y, dx * multiplier - dmean * multiplier + (x + -mean) * dmultiplier
