"""Small networks of many kinds with random weights, made without running them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kwjax import intercept
from kwjax.models.layers import MaxPool
from kwjax.network import Network
from kwjax.quantization import QuantizedNetwork, QuantRules, Ranges, quantize


class Setup(nn.Module):
  """Layers in setup, a Sequential, pooling, a dense layer on rows."""

  def setup(self) -> None:
    self.features = nn.Sequential(
      [nn.Conv(8, (3, 3)), nn.BatchNorm(True), nn.relu, nn.Conv(8, (3, 3), strides=2), nn.BatchNorm(True), nn.relu]
    )
    self.head = nn.Sequential([nn.Dense(12), nn.relu, nn.Dense(5)])

  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.avg_pool(self.features(x), (2, 2), strides=(2, 2))
    return self.head(x.reshape(x.shape[0], -1))


class Mixed(nn.Module):
  """What the networks of the registry do not have: groups, dilation, GroupNorm, gates, indexing, a two-way product."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    x = nn.Conv(8, (3, 3), kernel_dilation=(2, 2), name="dilated")(x)
    x = nn.BatchNorm(use_running_average=not train, name="bn")(x)
    x = nn.swish(x) + nn.hard_tanh(x)
    y = nn.Conv(8, (3, 3), feature_group_count=4, padding="REFLECT", name="grouped")(x[:, ::2, ::2, ::-1])
    y = nn.GroupNorm(num_groups=2, name="gn")(y)
    y = jnp.concatenate([y[..., 4:], jnp.pad(y[:, :, :, 1:3], ((0, 0), (0, 0), (0, 0), (1, 1)))], axis=-1)
    gate = nn.sigmoid(nn.Dense(8, name="gate")(y.mean((1, 2), keepdims=True)))
    y = MaxPool(3, 2, 1)(jnp.where(y > 0, y * gate, nn.gelu(y)))
    tokens = y.reshape(y.shape[0], -1, 8)
    weights = nn.softmax(jnp.einsum("bnc,bmc->bnm", tokens, tokens))
    mixed = nn.Dense(6, name="values")(jnp.einsum("bnm,bmc->bnc", weights, tokens))
    return nn.Dense(5, name="head")(jnp.concatenate([mixed[:, 0], mixed.max(1)], -1))


class Block(nn.Module):
  @nn.compact
  def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    y = nn.Conv(6, (3, 3), use_bias=False, name="conv")(x)
    return x + nn.relu(nn.BatchNorm(use_running_average=True, name="bn")(y)), None


class Scanned(nn.Module):
  """Blocks under nn.scan and nn.remat."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(6, (3, 3), name="stem")(x)
    axes = {"params": 0, "batch_stats": 0}
    x, _ = nn.scan(nn.remat(Block), variable_axes=axes, split_rngs={"params": True}, length=3)(name="blocks")(x, None)
    return nn.Dense(5, name="head")(x.mean((1, 2)))


def random_network(module: nn.Module, shape: tuple[int, int, int] = (8, 8, 3), seed: int = 0) -> Network:
  """Random weights of the usual size, statistics and affine parameters of both signs; nothing is compiled."""
  spec = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), jax.ShapeDtypeStruct((1, *shape), jnp.float32))
  random = np.random.default_rng(seed)

  def fill(path: tuple, leaf: Any) -> np.ndarray:
    name = path[-1].key
    value = random.normal(size=leaf.shape)
    if name == "kernel":
      value *= (2 / np.prod(leaf.shape[-4:-1] if leaf.ndim >= 4 else leaf.shape[:-1])) ** 0.5
    elif name == "var":
      value = np.exp(0.3 * value)
    elif name == "scale":
      value = 1 + 0.3 * value
      value.flat[0] *= -1
    else:
      value *= 0.3
    return value.astype(np.float32)

  variables = jax.tree_util.tree_map_with_path(fill, spec)
  count = shape[2]
  return Network(module, variables, image_shape=shape, input_mean=[0.45] * count, input_std=[0.25] * count, name="tiny")


def logits(network: Network | QuantizedNetwork, images: np.ndarray) -> np.ndarray:
  """The network itself, compiled in haste: most of these tests' time would go into optimizing programs that run once."""
  options = {"xla_backend_optimization_level": 0}
  return np.asarray(jax.jit(lambda found, x: found.apply(x), compiler_options=options)(network, images))


def quantized(network: Network, bits: str, scheme: str, **options: Any) -> QuantizedNetwork:
  """By ranges that suit normalised images and what comes out of a ReLU; nothing is run."""
  rules = QuantRules.parse(bits, weights=scheme, **options)
  first, *others = intercept.matmul_layers(network)
  rising = np.linspace(2.5, 4.0, len(others) or 1)
  ranges = {first.name: (-1.8, 2.2)}
  for layer, high in zip(others, rising, strict=True):
    ranges[layer.name] = (
      (np.zeros(layer.repeats), np.linspace(high, high + 1, layer.repeats)) if layer.repeats > 1 else (0, high)
    )
  return quantize(network, rules, Ranges(ranges))
