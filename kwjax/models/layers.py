"""The layers that every network is made of, with PyTorch's paddings and BatchNorm constants.

Flax modules carry the names of the PyTorch modules they mirror, so that converting weights is a renaming.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

TORCH_EPS = 1e-5
TORCH_MOMENTUM = 0.9
"""Weight of the old running statistics: Flax's momentum is one minus PyTorch's 0.1."""

_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


def conv(
  features: int, size: int, name: str, *, stride: int = 1, groups: int = 1, same: bool = False, bias: bool = False
) -> nn.Conv:
  """Square convolution f32[b,h,w,c] -> f32[b,oh,ow,features].

  Args:
    features: output channels.
    size: side of the kernel, odd.
    name: the layer's name.
    stride: step, in pixels.
    groups: channel groups.
    same: pad as TensorFlow's SAME, whose stride-2 layers pad less at the top left; otherwise size // 2 pixels on every
      side.
    bias: whether a bias is added.

  Returns: the layer.
  """
  return nn.Conv(
    features,
    (size, size),
    strides=(stride, stride),
    padding="SAME" if same else ((size // 2, size // 2), (size // 2, size // 2)),
    feature_group_count=groups,
    use_bias=bias,
    kernel_init=_KERNEL_INIT,
    name=name,
  )


def batch_norm(name: str, train: bool, *, eps: float = TORCH_EPS, momentum: float = TORCH_MOMENTUM) -> nn.BatchNorm:
  """BatchNorm over the last axis: batch statistics if `train`, else running ones.

  Flax's running variance is an average of biased batch variances, PyTorch's of unbiased ones; they differ by
  n / (n - 1) for n pixels, so fine-tuned statistics are comparable only up to that factor.
  """
  return nn.BatchNorm(use_running_average=not train, momentum=momentum, epsilon=eps, name=name)


def relu6(x: Array) -> Array:
  """min(max(x, 0), 6), elementwise."""
  return jnp.clip(x, 0.0, 6.0)


class MaxPool(nn.Module):
  """`nn.max_pool` as a module, so that it can be intercepted as other layers can: f32[b,h,w,c] -> f32[b,oh,ow,c].

  Attributes:
    size: side of the window, in pixels.
    stride: distance between windows, in pixels.
    padding: pixels added on each of the four sides, which never win.
  """

  size: int
  stride: int
  padding: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Returns y[b,h,w,c] = max_ij x[b, h s + i - p, w s + j - p, c]."""
    pads = (self.padding, self.padding)
    return nn.max_pool(x, (self.size, self.size), strides=(self.stride, self.stride), padding=(pads, pads))


def global_average_pool(x: Array) -> Array:
  """Mean over all pixels: f32[b,h,w,c] -> f32[b,c]."""
  return jnp.mean(x, axis=(1, 2))


def dropout(x: Array, rate: float, train: bool) -> Array:
  """Dropout in training mode with the random stream "dropout"; nothing (and no stream needed) at rate 0."""
  return nn.Dropout(rate, deterministic=not train)(x) if rate else x
