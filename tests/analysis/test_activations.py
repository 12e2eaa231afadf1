"""Distributions of activations: closed forms for Gaussian inputs, an independent forward pass, and how the set is cut."""

from __future__ import annotations

import math

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.analysis.activations import BINS, REACH, bin_edges, observe_activations
from kwjax.batchnorm import observe
from kwjax.errors import DataError, Interrupted, KwjaxError, NoBatchNormError
from kwjax.network import Network
from tests.foreign.conftest import Style, batch_norm_inputs, make_network
from tests.foreign.modules import LiftedNet
from tests.networks import tiny_network

ALL = (".*",)


class Direct(nn.Module):
  """BatchNorm on the image itself."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    x = nn.BatchNorm(use_running_average=not train, name="bn", epsilon=1e-12)(x)
    return nn.Dense(3, name="fc")(nn.relu(x).mean((1, 2)))


def direct_network() -> Network:
  """Running mean 0 and variance 1, and inputs that the network does not change."""
  variables = Direct().init(jax.random.key(0), jnp.zeros((1, 8, 8, 2)))
  return Network(Direct(), variables, image_shape=(8, 8, 2), input_mean=[0.0] * 2, input_std=[1.0] * 2)


def normal_images(count: int = 512) -> np.ndarray:
  return np.asarray(jax.random.normal(jax.random.key(1), (count, 8, 8, 2)))


def images(count: int) -> np.ndarray:
  return np.asarray(jax.random.uniform(jax.random.key(0), (count, 8, 8, 3)))


def test_what_the_running_statistics_say_has_no_divergence() -> None:
  found = observe_activations(direct_network(), normal_images(), batch_size=100)
  # 32768 values a channel: KL is a chi-squared of two degrees over twice that number.
  assert 0 <= found.divergence()["bn"] < 3e-4
  assert found.spread()["bn"] == pytest.approx(1, abs=0.02)
  counts = found.counts["bn"]
  assert counts.sum() == 512 * 8 * 8 * 2
  cumulative = [0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in bin_edges()]
  expected = np.diff(cumulative) * counts.sum()
  assert (np.abs(counts[1:-1] - expected) <= 5 * np.sqrt(expected) + 1).all()


@pytest.mark.parametrize(("scale", "shift"), [(2.0, 0.0), (0.25, 0.0), (1.5, -0.7)])
def test_scaled_inputs_have_the_divergence_of_two_gaussians(scale: float, shift: float) -> None:
  z = normal_images()
  z = (z - z.mean((0, 1, 2))) / z.std((0, 1, 2))
  found = observe_activations(direct_network(), scale * z + shift)
  expected = math.log(scale) - 0.5 * (1 - (1 + shift**2) / scale**2)
  assert found.divergence()["bn"] == pytest.approx(expected, rel=1e-4)
  assert found.spread()["bn"] == pytest.approx(scale, rel=1e-5)


def test_what_lies_beyond_the_bins_is_counted_at_the_ends() -> None:
  x = np.full((4, 8, 8, 2), REACH + 1, np.float32)
  x[0] = -REACH - 1
  counts = observe_activations(direct_network(), x).counts["bn"]
  assert (counts[0], counts[-1], counts[1:-1].sum()) == (128, 3 * 128, 0)
  assert len(counts) == BINS + 2


def test_counts_are_those_of_an_independent_forward_pass() -> None:
  evaluation = {"train": False}
  network = make_network(LiftedNet(), (8, 8, 4), evaluation)
  style = Style(network, evaluation, jax.random.uniform(jax.random.key(3), (8, 8, 8, 4)))
  found = observe_activations(network, style.images)
  inputs = batch_norm_inputs(style)
  assert sorted(found.counts) == sorted(inputs) == sorted(found.measured)
  assert "stack/BatchNorm_0[1]" in found.counts
  for layer, values in inputs.items():
    mean, var = (np.asarray(field, np.float64) for field in found.reference[layer])
    z = (values - mean) / np.sqrt(var + 1e-5)
    expected = np.histogram(z, np.concatenate([[-np.inf], bin_edges(), [np.inf]]))[0]
    assert expected.sum() == found.counts[layer].sum()
    # Single precision puts some values on the other side of an edge.
    assert np.abs(expected - found.counts[layer]).sum() <= 1e-3 * expected.sum() + 4
    np.testing.assert_allclose(found.measured[layer].mean, values.mean(0), atol=1e-5)
    np.testing.assert_allclose(found.measured[layer].var, values.var(0), rtol=1e-4)


def test_the_statistics_of_the_batch_undo_a_scale() -> None:
  network, x = tiny_network(), images(16)
  scaled = 0.45 + 3 * (x - 0.45)  # three times as large in the normalized space that the first layer sees
  plain, current = (observe_activations(network, x, current=c) for c in ((), ALL))
  plain_scaled, current_scaled = (observe_activations(network, scaled, current=c) for c in ((), ALL))
  np.testing.assert_allclose(current_scaled.logits, current.logits, atol=2e-3)
  np.testing.assert_allclose(current_scaled.measured["bn1"].var, current.measured["bn1"].var, rtol=1e-3)
  assert current_scaled.spread()["bn0"] == pytest.approx(3 * current.spread()["bn0"], rel=1e-4)
  assert plain_scaled.spread()["bn1"] > 1.5 * plain.spread()["bn1"]
  assert np.abs(plain_scaled.logits - plain.logits).max() > 0.1


def test_answers_are_the_networks() -> None:
  network, x = tiny_network(), images(6)
  np.testing.assert_allclose(observe_activations(network, x).logits, network.apply(x), atol=1e-5)
  expected, moments = observe(network, jnp.asarray(x), current=ALL)
  found = observe_activations(network, x, current=ALL)
  np.testing.assert_allclose(found.logits, expected, atol=1e-5)
  for layer, (mean, var) in moments.items():
    np.testing.assert_allclose(found.measured[layer].mean, mean, atol=1e-5)
    np.testing.assert_allclose(found.measured[layer].var, var, rtol=1e-4)


def test_dead_channels_are_those_that_a_layer_never_gets() -> None:
  network = tiny_network()
  flat = flax.traverse_util.flatten_dict(network.variables, sep="/")
  flat["params/bn0/bias"] = flat["params/bn0/bias"].at[3].set(-100.0)
  network = network.replace(variables=flax.traverse_util.unflatten_dict(flat, sep="/"))
  found = observe_activations(network, images(16))
  assert list(found.dead) == ["conv1", "fc"]
  assert np.flatnonzero(found.dead["conv1"]).tolist() == [3]
  assert not found.dead["fc"].any()
  assert found.dead_share() == pytest.approx(1 / (8 + 16))


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 8), (2, 24), (8, 16)])
def test_how_the_set_is_cut_does_not_matter_to_running_statistics(devices: int, batch_size: int) -> None:
  network, x = tiny_network(), images(23)  # eight devices get padding
  whole, parts = (
    observe_activations(network, x),
    observe_activations(network, x, batch_size=batch_size, devices=devices),
  )
  for layer in whole.counts:
    assert np.abs(parts.counts[layer] - whole.counts[layer]).sum() <= 4
    np.testing.assert_allclose(parts.measured[layer].mean, whole.measured[layer].mean, atol=1e-5)
    np.testing.assert_allclose(parts.measured[layer].var, whole.measured[layer].var, rtol=1e-4)
  np.testing.assert_allclose(parts.logits, whole.logits, atol=1e-5)


def test_current_statistics_are_those_of_all_devices() -> None:
  network, x = tiny_network(), images(21)
  one, eight = (observe_activations(network, x, current=ALL, devices=n) for n in (1, 8))
  np.testing.assert_allclose(eight.logits, one.logits, atol=1e-4)
  np.testing.assert_allclose(eight.measured["bn1"].var, one.measured["bn1"].var, rtol=1e-3)
  assert one.counts["bn0"].sum() == eight.counts["bn0"].sum() == 21 * 8 * 8 * 8


def test_what_cannot_be_observed_is_refused() -> None:
  with pytest.raises(NoBatchNormError):
    observe_activations(tiny_network(batch_norm=False), images(4))
  with pytest.raises(KwjaxError, match=r"no BatchNorm layer of tiny matches \['bn9'\]; there are bn0, bn1"):
    observe_activations(tiny_network(), images(4), current=("bn0", "bn9"))
  with pytest.raises(DataError, match="at least two images in a batch, found 1 images"):
    observe_activations(tiny_network(), images(1))
  with pytest.raises(DataError, match="found 4 images and batches of 1"):
    observe_activations(tiny_network(), images(4), batch_size=1)
  with pytest.raises(KwjaxError, match="tiny returns NaN or infinite logits"):
    observe_activations(tiny_network(), np.full((4, 8, 8, 3), np.nan, np.float32))
  with pytest.raises(Interrupted):
    observe_activations(tiny_network(), images(4), should_stop=lambda: True)
