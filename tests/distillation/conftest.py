"""Small networks for distillation: a few channels, two spatial sizes, a teacher and a perturbed copy of it."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.network import Network

SHAPE = (8, 8, 3)


class Block(nn.Module):
  """Conv, BatchNorm, ReLU and a shortcut where shapes allow one."""

  features: int
  stride: int = 1

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    y = nn.Conv(self.features, (3, 3), self.stride, use_bias=False)(x)
    y = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8)(y))
    return x + y if x.shape == y.shape else y


class TinyNet(nn.Module):
  """8x8 images -> stem, two blocks at 8x8, two at 4x4, 5 classes."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="stem_bn")(x))
    for i, stride in enumerate((1, 1, 2, 1)):
      x = Block(8, stride, name=f"block{i}")(x, train=train)
    return nn.Dense(5, name="head")(x.mean((1, 2)))


def make_network(module: nn.Module, seed: int = 0, name: str = "tiny") -> Network:
  """Random weights, and running statistics near those of random images, so that activations keep their size."""
  images = jax.random.uniform(jax.random.key(seed + 100), (64, *SHAPE))
  mean, std = (0.5, 0.4, 0.45), (0.25, 0.3, 0.2)
  x = (images - jnp.asarray(mean)) / jnp.asarray(std)
  variables = jax.jit(module.init)(jax.random.key(seed), x)
  observe = jax.jit(lambda v: module.apply(v, x, train=True, mutable=["batch_stats"])[1])
  for _ in range(20):
    variables = {**variables, **observe(variables)}
  return Network(module, variables, image_shape=SHAPE, input_mean=mean, input_std=std, name=name)


def perturbed(network: Network, size: float, seed: int = 7) -> Network:
  """Every parameter moved by `size` times its own standard deviation (plus a little)."""
  leaves, structure = jax.tree.flatten(network.variables["params"])
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  moved = [x + size * (jnp.std(x) + 0.01) * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
  return network.replace(variables={**network.variables, "params": structure.unflatten(moved)}, name="student")


@functools.cache
def _teacher() -> Network:
  return make_network(TinyNet(), name="teacher")


@pytest.fixture
def teacher() -> Network:
  """A `TinyNet`."""
  return _teacher()


@pytest.fixture
def student(teacher: Network) -> Network:
  """The teacher, perturbed."""
  return perturbed(teacher, 0.3)


@pytest.fixture
def tools() -> Any:
  """Builders that several test files use."""

  class Tools:
    tiny = TinyNet
    block = Block
    shape = SHAPE
    network = staticmethod(make_network)
    perturb = staticmethod(perturbed)

  return Tools


@pytest.fixture
def images() -> np.ndarray:
  """48 images f32 in [0, 1]."""
  return np.asarray(jax.random.uniform(jax.random.key(3), (48, *SHAPE)))
