"""Equalization: the same logits and alike ranges where structure allows it, and hands off where it does not."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.errors import KwjaxError
from kwjax.quantization.equalization import Pair, equalize, find_pairs

logits_of = jax.jit(lambda network, images: network.apply(images))


class Chain(nn.Module):
  """Conv, BatchNorm, activation, depthwise, 1x1 without BatchNorm, pooling, classifier."""

  activation: str = "relu"

  @nn.compact
  def __call__(self, x, train=False):
    act = {"relu": nn.relu, "relu6": lambda v: jnp.clip(v, 0, 6)}[self.activation]
    x = act(nn.BatchNorm(use_running_average=not train, name="bn1")(nn.Conv(6, (3, 3), name="conv1")(x)))
    x = nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x)
    x = act(nn.BatchNorm(use_running_average=not train, name="bn2")(x))
    x = act(nn.Conv(7, (1, 1), name="pointwise")(x))
    return nn.Dense(4, name="fc")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def chain(make_network):
  return make_network(Chain(), (8, 8, 3))


@pytest.mark.parametrize("criterion", ["weights", "activations"])
def test_logits_stay(chain, images, criterion):
  found = equalize(chain, criterion=criterion)
  assert found.pairs == (
    Pair("conv1", "bn1", "depthwise"),
    Pair("depthwise", "bn2", "pointwise"),
    Pair("pointwise", None, "fc"),
  )
  expected, logits = logits_of(chain, images), logits_of(found.network, images)
  np.testing.assert_allclose(logits, expected, atol=2e-5 * float(jnp.abs(expected).max()))
  assert max(np.abs(np.log(scale)).max() for scale in found.scales.values()) > 0.1
  # Statistics of BatchNorm inputs stay what they were, so images made before still fit.
  before = chain.variables["batch_stats"]["bn1"]
  jax.tree.map(np.testing.assert_array_equal, found.network.variables["batch_stats"]["bn1"], before)


def test_ranges_are_alike_afterwards(chain):
  params = equalize(chain, criterion="weights").network.variables["params"]
  before = np.abs(params["pointwise"]["kernel"]).max((0, 1, 2))
  behind = np.abs(params["fc"]["kernel"]).max(1)
  np.testing.assert_allclose(before, behind, rtol=1e-3)
  params = equalize(chain, criterion="activations").network.variables["params"]
  norm = params["bn2"]
  behind = np.abs(params["pointwise"]["kernel"]).max((0, 1, 3))
  highest = np.maximum(norm["bias"] + 3 * np.abs(norm["scale"]), 0)
  np.testing.assert_allclose(highest[highest > 0], behind[highest > 0], rtol=1e-3)


def test_relu6_is_left_alone_and_named(make_network):
  network = make_network(Chain("relu6"), (8, 8, 3))
  found = equalize(network)
  assert found.pairs == ()
  assert found.network is network
  assert set(found.unsupported) == {"conv1 -> depthwise", "depthwise -> pointwise", "pointwise -> fc"}
  assert "ReLU6" in found.unsupported["conv1 -> depthwise"]


def test_residual_additions_are_left_alone(network):
  """The stem is read by the depthwise layer and by the addition; the last 1x1 goes into the addition."""
  pairs = find_pairs(network)
  assert pairs.found == (Pair("depthwise", "depthwise_bn", "pointwise"),)
  assert set(pairs.unsupported) == {"stem -> depthwise", "pointwise -> classifier"}


def test_what_has_no_place_for_a_scale_is_named(stacked_networks, make_network):
  found = find_pairs(stacked_networks["scan"])
  assert not found.found
  assert any("stacked" in reason for reason in found.unsupported.values())

  class Flat(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.relu(nn.Conv(3, (3, 3), name="conv")(x))
      return nn.Dense(4, name="fc")(x.reshape(x.shape[0], -1))

  assert "takes 48 channels, conv gives 3" in find_pairs(make_network(Flat(), (4, 4, 3))).unsupported["conv -> fc"]
  with pytest.raises(KwjaxError, match="criterion"):
    equalize(stacked_networks["scan"], criterion="energy")


def test_a_dead_channel_is_left_alone(chain, images):
  variables = jax.tree.map(jnp.asarray, chain.variables)
  variables["params"]["bn1"]["scale"] = variables["params"]["bn1"]["scale"].at[2].set(0.0)
  variables["params"]["bn1"]["bias"] = variables["params"]["bn1"]["bias"].at[2].set(-1.0)
  found = equalize(chain.replace(variables=variables))
  assert found.scales["depthwise"][2] == 1
  assert np.isfinite(logits_of(found.network, images)).all()
