"""ResNet for ImageNet: He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), as in torchvision.

The bottleneck's stride sits on its 3x3 convolution, as in torchvision ("ResNet v1.5"), not on the first 1x1. The form for
small images keeps their size in the stem, and is otherwise the same network.
"""

from __future__ import annotations

import flax.linen as nn
from jax import Array

from kwjax.models.layers import MaxPool, batch_norm, conv, global_average_pool


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut: f32[b,h,w,c] -> f32[b,h/stride,w/stride,features]."""

  features: int
  stride: int = 1
  expansion = 1

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns relu(residual + shortcut)."""
    y = conv(self.features, 3, "conv1", stride=self.stride)(x)
    y = nn.relu(batch_norm("bn1", train)(y))
    y = conv(self.features, 3, "conv2")(y)
    y = batch_norm("bn2", train)(y)
    return nn.relu(y + _shortcut(x, self.features, self.stride, train))


class Bottleneck(nn.Module):
  """1x1, 3x3 and 1x1 convolutions and a shortcut: f32[b,h,w,c] -> f32[b,h/stride,w/stride,4 features]."""

  features: int
  stride: int = 1
  expansion = 4

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns relu(residual + shortcut)."""
    outputs = self.features * self.expansion
    y = conv(self.features, 1, "conv1")(x)
    y = nn.relu(batch_norm("bn1", train)(y))
    y = conv(self.features, 3, "conv2", stride=self.stride)(y)
    y = nn.relu(batch_norm("bn2", train)(y))
    y = conv(outputs, 1, "conv3")(y)
    y = batch_norm("bn3", train)(y)
    return nn.relu(y + _shortcut(x, outputs, self.stride, train))


def _shortcut(x: Array, features: int, stride: int, train: bool) -> Array:
  if stride == 1 and x.shape[-1] == features:
    return x
  return batch_norm("downsample_1", train)(conv(features, 1, "downsample_0", stride=stride)(x))


class ResNet(nn.Module):
  """ResNet with `blocks` blocks in each of its four stages.

  Attributes:
    blocks: number of blocks a stage.
    block: BasicBlock (ResNet-18, 34) or Bottleneck (50, 101).
    num_classes: number of logits.
    small_images: the form for 32x32 images: a 3x3 stem of stride 1 and no pooling after it, so that the last stage still has
      4x4 pixels; else 7x7 of stride 2 and a pooling.
  """

  blocks: tuple[int, int, int, int]
  block: type[BasicBlock] | type[Bottleneck]
  num_classes: int = 1000
  small_images: bool = False

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps normalised images f32[b,h,w,3] to logits f32[b,num_classes]; `train` makes BatchNorm use the batch."""
    x = conv(64, 3, "conv1")(x) if self.small_images else conv(64, 7, "conv1", stride=2)(x)
    x = nn.relu(batch_norm("bn1", train)(x))
    x = x if self.small_images else MaxPool(3, 2, 1, name="maxpool")(x)
    for stage, count in enumerate(self.blocks):
      for index in range(count):
        stride = 2 if stage > 0 and index == 0 else 1
        x = self.block(64 * 2**stage, stride, name=f"layer{stage + 1}_{index}")(x, train)
    return nn.Dense(self.num_classes, name="fc")(global_average_pool(x))
