"""MobileNetV2: Sandler et al., "Inverted Residuals and Linear Bottlenecks" (arXiv:1801.04381), torchvision's layers."""

from __future__ import annotations

import flax.linen as nn
from jax import Array

from kwjax.models.layers import batch_norm, conv, dropout, global_average_pool, relu6

# (expansion, output channels, number of blocks, stride of the first block)
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_SECOND = 1


class InvertedResidual(nn.Module):
  """1x1 expansion, 3x3 depthwise, linear 1x1 projection: f32[b,h,w,c] -> f32[b,h/stride,w/stride,features]."""

  features: int
  stride: int
  expansion: int

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns the projection, plus the input where the shapes agree."""
    hidden = x.shape[-1] * self.expansion
    y, position = x, 0
    if self.expansion != 1:
      y = conv(hidden, 1, "conv_0_0")(y)
      y = relu6(batch_norm("conv_0_1", train)(y))
      position = 1
    y = conv(hidden, 3, f"conv_{position}_0", stride=self.stride, groups=hidden)(y)
    y = relu6(batch_norm(f"conv_{position}_1", train)(y))
    y = conv(self.features, 1, f"conv_{position + 1}")(y)
    y = batch_norm(f"conv_{position + 2}", train)(y)
    return y + x if self.stride == 1 and x.shape[-1] == self.features else y


class MobileNetV2(nn.Module):
  """MobileNetV2 of width 1.

  Attributes:
    num_classes: number of logits.
    dropout_rate: dropout before the classifier in training mode (the original trained with 0.2); needs the random
      stream "dropout".
    small_images: the form for 32x32 images: stem and second stage of stride 1, so that the last stage still has 4x4 pixels.
  """

  num_classes: int = 1000
  dropout_rate: float = 0.0
  small_images: bool = False

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps normalised images f32[b,h,w,3] to logits f32[b,num_classes]; `train` makes BatchNorm use the batch."""
    x = conv(32, 3, "features_0_0", stride=1 if self.small_images else 2)(x)
    x = relu6(batch_norm("features_0_1", train)(x))
    position = 1
    for stage, (expansion, features, count, first_stride) in enumerate(_STAGES):
      for index in range(count):
        stride = 1 if index > 0 or (self.small_images and stage == _SECOND) else first_stride
        x = InvertedResidual(features, stride, expansion, name=f"features_{position}")(x, train)
        position += 1
    x = conv(1280, 1, f"features_{position}_0")(x)
    x = relu6(batch_norm(f"features_{position}_1", train)(x))
    x = dropout(global_average_pool(x), self.dropout_rate, train)
    return nn.Dense(self.num_classes, name="classifier_1")(x)
