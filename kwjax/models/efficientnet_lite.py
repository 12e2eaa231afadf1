"""EfficientNet-Lite0: Tan and Le's EfficientNet-B0 (arXiv:1905.11946) without squeeze-and-excite and with ReLU6.

TensorFlow's SAME padding throughout, BatchNorm eps 1e-3 and momentum 0.99, as its published weights were trained.
"""

from __future__ import annotations

import functools

import flax.linen as nn
from jax import Array

from kwjax.models.layers import batch_norm, conv, dropout, global_average_pool, relu6

EPS = 1e-3
MOMENTUM = 0.99

# (kernel size, stride of the first block, expansion, output channels, number of blocks)
_STAGES = (
  (3, 1, 1, 16, 1),
  (3, 2, 6, 24, 2),
  (5, 2, 6, 40, 2),
  (3, 2, 6, 80, 3),
  (5, 1, 6, 112, 3),
  (5, 2, 6, 192, 4),
  (3, 1, 6, 320, 1),
)

_norm = functools.partial(batch_norm, eps=EPS, momentum=MOMENTUM)


class MBConvBlock(nn.Module):
  """1x1 expansion, depthwise, linear 1x1 projection: f32[b,h,w,c] -> f32[b,ceil(h/stride),ceil(w/stride),features]."""

  features: int
  size: int
  stride: int
  expansion: int

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns the projection, plus the input where the shapes agree."""
    hidden, y = x.shape[-1] * self.expansion, x
    if self.expansion != 1:
      y = relu6(_norm("bn0", train)(conv(hidden, 1, "expand_conv", same=True)(y)))
    y = conv(hidden, self.size, "depthwise_conv", stride=self.stride, groups=hidden, same=True)(y)
    y = relu6(_norm("bn1", train)(y))
    y = _norm("bn2", train)(conv(self.features, 1, "project_conv", same=True)(y))
    return y + x if self.stride == 1 and x.shape[-1] == self.features else y


class EfficientNetLite(nn.Module):
  """EfficientNet-Lite0.

  Attributes:
    num_classes: number of logits.
    dropout_rate: dropout before the classifier in training mode (the original trained with 0.2); needs the random
      stream "dropout".
  """

  num_classes: int = 1000
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps normalised images f32[b,h,w,3] to logits f32[b,num_classes]; `train` makes BatchNorm use the batch."""
    x = relu6(_norm("bn0", train)(conv(32, 3, "conv_stem", stride=2, same=True)(x)))
    position = 0
    for size, first_stride, expansion, features, count in _STAGES:
      for index in range(count):
        stride = first_stride if index == 0 else 1
        x = MBConvBlock(features, size, stride, expansion, name=f"blocks_{position}")(x, train)
        position += 1
    x = relu6(_norm("bn1", train)(conv(1280, 1, "conv_head", same=True)(x)))
    x = dropout(global_average_pool(x), self.dropout_rate, train)
    return nn.Dense(self.num_classes, name="fc")(x)
