"""The units of networks in many styles: complete, in order, and one after the other the network itself."""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kwjax
from kwjax.errors import KwjaxError
from kwjax.intercept import matmul_layers
from kwjax.models.densenet import DenseNet
from kwjax.network import Network
from kwjax.reconstruction import Unit, find_units
from kwjax.reconstruction.trace import given_variables
from kwjax.reconstruction.units import Cut
from tests.foreign.conftest import STYLES, make_network
from tests.networks import random_network


def through_units(network: Network, images: jax.Array) -> jax.Array:
  cut = Cut(network, find_units(network), {}, "float", given_variables(network.variables, {}), len(images))

  @jax.jit
  def chain(variables: Any, x: jax.Array) -> jax.Array:
    for part in cut.parts:
      x = part(part.leaves(variables), x)
    return x

  return chain(given_variables(network.variables, {}), images)


@pytest.mark.parametrize("name", list(STYLES))
def test_units_of_foreign_modules_are_complete_and_give_the_network(name: str) -> None:
  module, shape, evaluation = STYLES[name]
  network = make_network(module, shape, evaluation)
  units = find_units(network)
  layers = list(itertools.chain(*(unit.layers for unit in units)))
  assert layers == [layer.name for layer in matmul_layers(network)]
  images = jax.random.uniform(jax.random.key(3), (3, *shape))
  np.testing.assert_allclose(through_units(network, images), jax.jit(network.apply)(images), rtol=1e-4, atol=1e-5)


def test_a_residual_block_that_is_written_inline_is_one_unit(residual: Network) -> None:
  assert find_units(residual) == (
    Unit("stem", ("stem",)),
    Unit("conv1 to conv2", ("conv1", "conv2")),
    Unit("classifier", ("classifier",)),
  )


@pytest.mark.parametrize(
  ("module", "count", "name", "size"),
  [
    (kwjax.get_model("resnet20"), 11, "layer1_0", 2),
    (kwjax.get_model("mobilenet_v2"), 20, "features_2", 3),  # no addition: a chain of three layers in one module
    (DenseNet((2, 1, 1, 1), growth=4), 10, "denseblock1/denselayer2", 2),
  ],
  ids=["resnet", "mobilenet", "densenet"],
)
def test_units_of_known_networks_are_their_blocks(module: nn.Module, count: int, name: str, size: int) -> None:
  shape = (32, 32, 3)
  variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, *shape))))
  network = Network(module, variables, image_shape=shape, input_mean=(0.5,) * 3, input_std=(0.2,) * 3)
  units = {unit.name: unit for unit in find_units(network)}
  assert len(units) == count
  assert len(units[name].layers) == size


class Chain(nn.Module):
  """Six convolutions of one module, one after the other: no block of them is more natural than a layer."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for _ in range(6):
      x = nn.relu(nn.Conv(4, (3, 3))(x))
    return x


class Chained(nn.Module):
  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.Dense(3)(Chain(name="features")(x).mean((1, 2)))


class Shared(nn.Module):
  """One convolution that is used twice, with another one between."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shared = nn.Conv(3, (3, 3), name="shared")
    x = nn.relu(nn.Conv(3, (1, 1), name="between")(nn.relu(shared(x))))
    return nn.Dense(3, name="head")(shared(x).mean((1, 2)))


def test_a_long_chain_is_cut_at_every_layer_and_patterns_join_some() -> None:
  network = random_network(Chained())
  assert [len(unit.layers) for unit in find_units(network)] == [1] * 7
  joined = find_units(network, ["features/Conv_[0-2]"])
  assert [len(unit.layers) for unit in joined] == [3, 1, 1, 1, 1]
  with pytest.raises(KwjaxError, match=r"no layer of tiny matches 'other'.*features/Conv_0"):
    find_units(network, ["other"])


def test_a_kernel_that_is_used_twice_is_in_one_unit() -> None:
  network = random_network(Shared())
  assert [unit.layers for unit in find_units(network)] == [("shared", "between"), ("head",)]
  images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
  np.testing.assert_allclose(through_units(network, images), jax.jit(network.apply)(images), rtol=1e-4, atol=1e-5)


def test_units_of_one_program_are_equal_and_others_are_not() -> None:
  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
      for i, width in enumerate((6, 6, 6, 8)):
        x = nn.relu(nn.BatchNorm(use_running_average=True, name=f"bn{i}")(nn.Conv(width, (3, 3), name=f"conv{i}")(x)))
      return nn.Dense(3, name="head")(x.mean((1, 2)))

  network = random_network(Twice())
  variables: Any = dict(network.variables)
  parts = Cut(network, find_units(network), {}, "float", variables, 2).parts
  assert parts[1] == parts[2]
  assert len(set(parts)) == 4
  assert parts[1].leaves(variables)[0] is not parts[2].leaves(variables)[0]
