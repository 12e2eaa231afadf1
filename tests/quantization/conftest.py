"""Small random networks: a plain one, and one block structure written out, under remat and under scan."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from kwjax.network import Network


class Plain(nn.Module):
  """3x3, 1x1 and grouped convolutions with a residual addition; layers are created out of execution order."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    classifier = nn.Dense(5, name="classifier")
    x = nn.Conv(8, (3, 3), name="stem")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, name="stem_bn")(x))
    y = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
    y = nn.relu(nn.BatchNorm(use_running_average=not train, name="depthwise_bn")(y))
    y = nn.Conv(8, (1, 1), use_bias=False, name="pointwise")(y)
    x = x + nn.BatchNorm(use_running_average=not train, name="pointwise_bn")(y)
    return classifier(x.mean((1, 2)))


class Block(nn.Module):
  @nn.compact
  def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    y = nn.Conv(6, (3, 3), use_bias=False, name="conv")(x)
    y = nn.BatchNorm(use_running_average=True, name="bn")(y)
    return x + nn.relu(y), None


class Stacked(nn.Module):
  """Three equal blocks: `form` is "unrolled", "remat" or "scan"."""

  form: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(6, (3, 3), name="stem")(x)
    if self.form == "scan":
      scanned = nn.scan(
        nn.remat(Block), variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3
      )
      x, _ = scanned(name="blocks")(x, None)
    else:
      block = nn.remat(Block) if self.form == "remat" else Block
      for i in range(3):
        x, _ = block(name=f"block{i}")(x, None)
    return nn.Dense(4, name="head")(x.mean((1, 2)))


def random_variables(module: nn.Module, shape: tuple[int, ...], seed: int) -> dict:
  """Initial parameters with random biases and random running statistics."""
  variables = jax.jit(module.init)(jax.random.key(seed), jnp.zeros((1, *shape)))
  leaves, structure = jax.tree_util.tree_flatten_with_path(variables)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))

  def fill(path: tuple, leaf: jax.Array, key: jax.Array) -> jax.Array:
    name = path[-1].key
    if name == "kernel":
      return leaf
    noise = jax.random.normal(key, leaf.shape)
    return {"var": jnp.exp(0.3 * noise), "scale": 1 + 0.2 * noise}.get(name, 0.3 * noise)

  return jax.tree_util.tree_unflatten(structure, [fill(p, leaf, k) for (p, leaf), k in zip(leaves, keys, strict=True)])


def as_network(module: nn.Module, shape: tuple[int, int, int], variables: dict | None = None, seed: int = 0) -> Network:
  variables = random_variables(module, shape, seed) if variables is None else variables
  channels = shape[2]
  return Network(
    module, variables, image_shape=shape, input_mean=[0.45] * channels, input_std=[0.25] * channels, name="tiny"
  )


@pytest.fixture(scope="session")
def network() -> Network:
  return as_network(Plain(), (8, 8, 3))


@pytest.fixture(scope="session")
def make_network() -> Callable[..., Network]:
  """`(module, image shape, variables=None, seed=0) -> Network` with random variables."""
  return as_network


@pytest.fixture(scope="session")
def stacked_networks() -> dict[str, Network]:
  """The same function in three forms: `{"unrolled", "remat", "scan"}`."""
  shape = (6, 6, 6)
  unrolled = random_variables(Stacked("unrolled"), shape, 3)

  def stack(collection: dict) -> dict:
    blocks = [collection[f"block{i}"] for i in range(3)]
    rest = {name: value for name, value in collection.items() if not name.startswith("block")}
    return {**rest, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}

  scan = {name: stack(collection) for name, collection in unrolled.items()}
  return {
    form: as_network(Stacked(form), shape, scan if form == "scan" else unrolled)
    for form in ("unrolled", "remat", "scan")
  }


@pytest.fixture(scope="session")
def images() -> jax.Array:
  return jax.random.uniform(jax.random.key(7), (12, 8, 8, 3))
