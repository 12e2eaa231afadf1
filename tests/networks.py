"""Tiny networks for tests, with running statistics that look trained."""

from __future__ import annotations

import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from kwjax.network import Network


class TinyNet(nn.Module):
  """Two convolutions with BatchNorm and a classifier; with `batch_norm=False` the same without BatchNorm."""

  num_classes: int = 5
  width: int = 8
  batch_norm: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    for i, stride in enumerate((1, 2)):
      x = nn.Conv(self.width * stride, (3, 3), (stride, stride), use_bias=False, name=f"conv{i}")(x)
      if self.batch_norm:
        x = nn.BatchNorm(use_running_average=not train, name=f"bn{i}")(x)
      x = nn.relu(x)
    return nn.Dense(self.num_classes, name="fc")(x.mean((1, 2)))


def random_network(module: nn.Module, *, image_shape: tuple[int, int, int] = (8, 8, 3), seed: int = 0) -> Network:
  """A network with random weights, statistics and affine parameters, none of them trivial."""
  variables = module.init(jax.random.key(seed), jnp.zeros((1, *image_shape)))

  def shake(path: tuple, leaf: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed + 1), zlib.crc32(jax.tree_util.keystr(path).encode()) % 2**31)
    name = path[-1].key
    if name in ("mean", "bias"):
      return 0.3 * jax.random.normal(key, leaf.shape)
    if name in ("var", "scale"):
      return jax.random.uniform(key, leaf.shape, minval=0.5, maxval=1.5)
    return leaf

  variables = jax.tree_util.tree_map_with_path(shake, variables)
  channels = image_shape[2]
  return Network(
    module, variables, image_shape=image_shape, input_mean=[0.45] * channels, input_std=[0.25] * channels, name="tiny"
  )


def tiny_network(**options: object) -> Network:
  """`TinyNet` with random weights on 8x8 RGB images."""
  return random_network(TinyNet(**options))
