"""Bias correction: exact on a linear layer, layer after layer behind BatchNorm, on several devices, under scan."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.batchnorm import observe
from kwjax.errors import DataError, KwjaxError
from kwjax.quantization import QuantRules, calibrate, quantize
from kwjax.quantization.bias_correction import correct_bias

logits_of = jax.jit(lambda network, images: network.apply(images))
moments_of = jax.jit(lambda network, images: observe(network, images)[1])


class Linear(nn.Module):
  bias: bool = True

  @nn.compact
  def __call__(self, x):
    return nn.Dense(5, use_bias=self.bias, name="fc")(x.reshape(x.shape[0], -1))


def copy_of(network, images, bits="3w3a"):
  rules = QuantRules.parse(bits)
  return quantize(network, rules, calibrate(network, images, rules, key=jax.random.key(0), steps=2, batch_size=16))


def test_mean_error_of_a_linear_layer_vanishes(make_network, images):
  network = make_network(Linear(), (8, 8, 3))
  copy = copy_of(network, images)
  corrected = correct_bias(copy, images)
  error, left = (np.abs((logits_of(c, images) - logits_of(network, images)).mean(0)).max() for c in (copy, corrected))
  assert error > 1e-2
  assert left < 1e-5
  # Nothing but the bias has changed.
  np.testing.assert_array_equal(
    corrected.variables["params"]["fc"]["kernel"], network.variables["params"]["fc"]["kernel"]
  )


def test_every_batch_norm_input_has_the_float_mean_again(network, images):
  copy = copy_of(network, images)
  corrected = correct_bias(copy, images)
  wanted, found, before = (moments_of(n, images) for n in (network, corrected, copy))
  reference = network.variables["batch_stats"]
  for name, moments in wanted.items():
    # A BatchNorm layer sees the error, and its running mean has moved with it.
    moved = corrected.variables["batch_stats"][name]["mean"] - reference[name]["mean"]
    np.testing.assert_allclose(found[name].mean - moved, moments.mean, atol=2e-5)
  assert max(np.abs(before[name].mean - m.mean).max() for name, m in wanted.items()) > 1e-2
  logits, expected, plain = (logits_of(n, images).mean(0) for n in (corrected, network, copy))
  np.testing.assert_allclose(logits, expected, atol=2e-5)
  assert np.abs(plain - expected).max() > 1e-2


def test_batch_norm_gives_the_float_mean_and_variance_again(network, images):
  copy = copy_of(network, images)
  corrected = correct_bias(copy, images, variance=True)
  eps = 1e-5  # Flax's default

  def normalized(net):
    """Mean and variance of what every BatchNorm gives, but for its scale and bias."""
    stats = net.variables["batch_stats"]
    for name, moments in moments_of(net, images).items():
      deviation = np.sqrt(stats[name]["var"] + eps)
      yield name, (moments.mean - stats[name]["mean"]) / deviation, moments.var / deviation**2

  for (name, mean, var), (_, found_mean, found_var) in zip(normalized(network), normalized(corrected), strict=True):
    np.testing.assert_allclose(found_mean, mean, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(found_var, var, rtol=1e-3, err_msg=name)
  ratio = [np.abs(b[2] / a[2] - 1).max() for a, b in zip(normalized(network), normalized(copy), strict=True)]
  assert max(ratio) > 0.05


def test_devices_and_batches(network, images):
  copy = copy_of(network, images)
  # Five devices get padding.
  one, two, five = (correct_bias(copy, images, variance=True, devices=n) for n in (1, 2, 5))
  for other in (two, five):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.variables, other.variables)


def test_every_image_counts_alike(network, images):
  copy = copy_of(network, images)
  # At most 5 a batch: of 11 images batches of 3, 4 and 4. What a batch finds is added, so it is averaged over images.
  found = correct_bias(copy, images[:11], batch_size=5, variance=True).variables
  parts = [
    jax.tree.map(
      lambda x, share=len(part) / 11: share * np.float64(x), correct_bias(copy, part, variance=True).variables
    )
    for part in (images[:3], images[3:7], images[7:11])
  ]
  expected = jax.tree.map(lambda *values: sum(values), *parts)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_stacked_layers(stacked_networks):
  images = jax.random.uniform(jax.random.key(2), (4, 6, 6, 6))
  found, expected = (correct_bias(copy_of(stacked_networks[f], images), images) for f in ("scan", "unrolled"))
  np.testing.assert_allclose(logits_of(found, images), logits_of(expected, images), atol=1e-4)


def test_what_cannot_be_corrected_is_refused(make_network, network, images):
  bare = make_network(Linear(bias=False), (8, 8, 3))
  with pytest.raises(KwjaxError, match="no layer has a bias or BatchNorm"):
    correct_bias(copy_of(bare, images), images)
  with pytest.raises(DataError, match="takes images of shape"):
    correct_bias(copy_of(network, images), images[:, :4])


class Recurrent(nn.Module):
  """A convolution and a BatchNorm that are called three times, on inputs of different sizes."""

  @nn.compact
  def __call__(self, x, train=False):
    conv, norm = nn.Conv(6, (3, 3), name="conv"), nn.BatchNorm(use_running_average=not train, name="norm")
    x = nn.Conv(6, (1, 1), name="stem")(x)
    for i in range(3):
      x = nn.relu(norm(conv(x)) * (i + 1))
    return nn.Dense(4, name="head")(x.mean((1, 2)))


def test_a_layer_that_is_called_several_times_keeps_its_error(make_network, images):
  network = make_network(Recurrent(), (8, 8, 3))
  copy = copy_of(network, images)
  corrected = correct_bias(copy, images, variance=True)
  before, after = copy.variables, corrected.variables
  for leaf in ("mean", "var"):
    np.testing.assert_array_equal(after["batch_stats"]["norm"][leaf], before["batch_stats"]["norm"][leaf])
  np.testing.assert_array_equal(after["params"]["conv"]["bias"], before["params"]["conv"]["bias"])
  assert np.abs(after["params"]["stem"]["bias"] - before["params"]["stem"]["bias"]).max() > 1e-4
  error, left = (np.abs((logits_of(c, images) - logits_of(network, images)).mean(0)).max() for c in (copy, corrected))
  assert left < 1e-4 < error


class Several(nn.Module):
  @nn.compact
  def __call__(self, x):
    norm = nn.BatchNorm(use_running_average=True, name="norm")
    return nn.Dense(4, use_bias=False, name="head")(norm(norm(x)).mean((1, 2)))


def test_nothing_but_layers_that_are_called_several_times_is_refused(make_network, images):
  with pytest.raises(KwjaxError, match=r"each layer with a bias or BatchNorm is called several times \(norm\)"):
    correct_bias(copy_of(make_network(Several(), (8, 8, 3)), images), images)


class Channels(nn.Module):
  """Two BatchNorm layers, whose channels are along `axis`."""

  axis: int

  @nn.compact
  def __call__(self, x, train=False):
    for i, width in enumerate((4, 6)):
      x = jnp.moveaxis(nn.Conv(width, (3, 3), use_bias=False, name=f"conv{i}")(x), -1, self.axis)
      x = nn.relu(nn.BatchNorm(use_running_average=not train, axis=self.axis, name=f"norm{i}")(x))
      x = jnp.moveaxis(x, self.axis, -1)
    return nn.Dense(4, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize("variance", [False, True])
def test_channels_may_be_along_any_axis(make_network, images, variance):
  last = make_network(Channels(-1), (8, 8, 3))
  first = last.replace(module=Channels(1))
  found, expected = (correct_bias(copy_of(network, images), images, variance=variance) for network in (first, last))
  for path, value in jax.tree_util.tree_leaves_with_path(expected.variables):
    np.testing.assert_allclose(
      dict(jax.tree_util.tree_leaves_with_path(found.variables))[path], value, rtol=1e-5, atol=1e-6
    )
  moved = expected.variables["batch_stats"]["norm1"]["mean"] - last.variables["batch_stats"]["norm1"]["mean"]
  assert np.abs(moved).max() > 1e-3
