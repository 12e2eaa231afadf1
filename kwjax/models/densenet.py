"""DenseNet-BC: Huang et al., "Densely Connected Convolutional Networks" (arXiv:1608.06993), torchvision's layers."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from kwjax.models.layers import MaxPool, batch_norm, conv, global_average_pool


class DenseLayer(nn.Module):
  """BN, ReLU, 1x1, BN, ReLU, 3x3: f32[b,h,w,c] -> the layer's new channels f32[b,h,w,growth]."""

  growth: int

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns the new channels alone."""
    y = nn.relu(batch_norm("norm1", train)(x))
    y = conv(4 * self.growth, 1, "conv1")(y)
    y = nn.relu(batch_norm("norm2", train)(y))
    return conv(self.growth, 3, "conv2")(y)


class DenseBlock(nn.Module):
  """`layers` dense layers, each reading all channels before it: f32[b,h,w,c] -> f32[b,h,w,c + layers * growth]."""

  layers: int
  growth: int

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns the input's channels followed by those of each layer in turn."""
    for index in range(self.layers):
      x = jnp.concatenate([x, DenseLayer(self.growth, name=f"denselayer{index + 1}")(x, train)], axis=-1)
    return x


class Transition(nn.Module):
  """BN, ReLU, 1x1 to half of the channels, mean of 2x2 pixels: f32[b,h,w,c] -> f32[b,h//2,w//2,c//2]."""

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns the pooled projection."""
    y = nn.relu(batch_norm("norm", train)(x))
    y = conv(x.shape[-1] // 2, 1, "conv")(y)
    return nn.avg_pool(y, (2, 2), (2, 2))


class DenseNet(nn.Module):
  """DenseNet-BC with compression 1/2 and bottlenecks of 4 * growth channels.

  Attributes:
    blocks: number of layers in each dense block; (6, 12, 24, 16) for 121, (6, 12, 32, 32) for 169.
    growth: channels added by a layer.
    num_classes: number of logits.
    small_images: the form for 32x32 images: a 3x3 stem of stride 1, straight into the first block, which begins with a
      BatchNorm of its own; else 7x7 of stride 2, BatchNorm, ReLU and a pooling.
  """

  blocks: tuple[int, int, int, int]
  growth: int = 32
  num_classes: int = 1000
  small_images: bool = False

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps normalised images f32[b,h,w,3] to logits f32[b,num_classes]; `train` makes BatchNorm use the batch."""
    if self.small_images:
      x = conv(2 * self.growth, 3, "conv0")(x)
    else:
      x = conv(2 * self.growth, 7, "conv0", stride=2)(x)
      x = nn.relu(batch_norm("norm0", train)(x))
      x = MaxPool(3, 2, 1, name="pool0")(x)
    for index, layers in enumerate(self.blocks, 1):
      x = DenseBlock(layers, self.growth, name=f"denseblock{index}")(x, train)
      if index < len(self.blocks):
        x = Transition(name=f"transition{index}")(x, train)
    x = nn.relu(batch_norm("norm5", train)(x))
    return nn.Dense(self.num_classes, name="classifier")(global_average_pool(x))
