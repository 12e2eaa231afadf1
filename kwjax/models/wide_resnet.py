"""Wide residual networks: Zagoruyko and Komodakis (arXiv:1605.07146), pre-activation blocks for 32x32 images."""

from __future__ import annotations

import flax.linen as nn
from jax import Array

from kwjax.models.layers import batch_norm, conv, dropout, global_average_pool


class WideBlock(nn.Module):
  """BN, ReLU, 3x3, BN, ReLU, 3x3 and a shortcut: f32[b,h,w,c] -> f32[b,h/stride,w/stride,features]."""

  features: int
  stride: int = 1
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns residual + shortcut, without a ReLU: the next block begins with one."""
    activated = nn.relu(batch_norm("bn1", train)(x))
    y = conv(self.features, 3, "conv1", stride=self.stride)(activated)
    y = nn.relu(batch_norm("bn2", train)(y))
    y = conv(self.features, 3, "conv2")(dropout(y, self.dropout_rate, train))
    if x.shape[-1] == self.features:
      return y + x
    # The projection reads the activated input, the identity the raw one.
    return y + conv(self.features, 1, "convShortcut", stride=self.stride)(activated)


class WideResNet(nn.Module):
  """Wide ResNet of depth 6 n + 4 with n blocks in each of its three stages of 16 w, 32 w and 64 w channels.

  Attributes:
    blocks_per_stage: n; 2, 4 and 6 for depths 16, 28 and 40.
    widen_factor: w.
    num_classes: number of logits.
    dropout_rate: dropout between the two convolutions of a block in training mode; needs the random stream "dropout".
  """

  blocks_per_stage: int
  widen_factor: int
  num_classes: int = 100
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps normalised images f32[b,h,w,3] to logits f32[b,num_classes]; `train` makes BatchNorm use the batch."""
    x = conv(16, 3, "conv1")(x)
    for stage in range(3):
      for index in range(self.blocks_per_stage):
        stride = 2 if stage > 0 and index == 0 else 1
        features = 16 * 2**stage * self.widen_factor
        x = WideBlock(features, stride, self.dropout_rate, name=f"block{stage + 1}_layer_{index}")(x, train)
    x = nn.relu(batch_norm("bn1", train)(x))
    return nn.Dense(self.num_classes, name="fc")(global_average_pool(x))
