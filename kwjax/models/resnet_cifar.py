"""ResNet for 32x32 images: section 4.2 of He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385).

Shortcuts between stages have no parameters (the paper's option A): every second pixel, and zeros for the channels that
the smaller stage does not have.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from kwjax.models.layers import batch_norm, conv, global_average_pool


class CifarBlock(nn.Module):
  """Two 3x3 convolutions and a parameter-free shortcut: f32[b,h,w,c] -> f32[b,h/stride,w/stride,features]."""

  features: int
  stride: int = 1

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns relu(residual + shortcut)."""
    y = conv(self.features, 3, "conv1", stride=self.stride)(x)
    y = nn.relu(batch_norm("bn1", train)(y))
    y = conv(self.features, 3, "conv2")(y)
    y = batch_norm("bn2", train)(y)
    return nn.relu(y + _shortcut_a(x, self.features, self.stride))


def _shortcut_a(x: Array, features: int, stride: int) -> Array:
  missing = features - x.shape[-1]
  if stride == 1 and missing == 0:
    return x
  # Half of the zero channels come before the image's own and half after: trained weights depend on it.
  return jnp.pad(x[:, ::stride, ::stride, :], ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class CifarResNet(nn.Module):
  """ResNet of depth 6 n + 2 with n blocks in each of its three stages of 16, 32 and 64 channels.

  Attributes:
    blocks_per_stage: n; 3, 5, 7, 9 and 18 for depths 20, 32, 44, 56 and 110.
    num_classes: number of logits.
  """

  blocks_per_stage: int
  num_classes: int = 10

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps normalised images f32[b,h,w,3] to logits f32[b,num_classes]; `train` makes BatchNorm use the batch."""
    x = conv(16, 3, "conv1")(x)
    x = nn.relu(batch_norm("bn1", train)(x))
    for stage in range(3):
      for index in range(self.blocks_per_stage):
        stride = 2 if stage > 0 and index == 0 else 1
        x = CifarBlock(16 * 2**stage, stride, name=f"layer{stage + 1}_{index}")(x, train)
    return nn.Dense(self.num_classes, name="linear")(global_average_pool(x))
