"""Modules that need help before they can be used: several outputs, attributes without a hash, a mode without a default."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kwjax
from kwjax.distillation import stage_outputs
from kwjax.errors import KwjaxError
from kwjax.intercept import matmul_layers
from kwjax.training import initial_variables
from tests.foreign.conftest import make_network
from tests.foreign.modules import SetupNet, TwoHeads
from tests.networks import random_network

IMAGES = jax.random.uniform(jax.random.key(3), (6, 8, 8, 3))
EVALUATION = {"train": False}
apply = jax.jit(lambda network, images: network.apply(images))
observe = jax.jit(kwjax.observe)


@pytest.mark.parametrize(
  ("form", "output", "key"), [("dict", "main", "main"), ("tuple", 0, 0), ("nested", (1, "main"), None)]
)
def test_one_of_several_outputs_is_the_logits(form: str, output: object, key: object, tmp_path: pathlib.Path) -> None:
  module = TwoHeads(form)
  network = make_network(module, (8, 8, 3), EVALUATION, output=output)
  everything = jax.jit(module.apply)(network.variables, (IMAGES - 0.45) / 0.25)
  expected = everything[1]["main"] if key is None else everything[key]
  np.testing.assert_allclose(apply(network, IMAGES), expected, rtol=1e-4, atol=1e-5)
  assert network.num_classes == 5
  kwjax.save_network(network, tmp_path)
  loaded = kwjax.load_network(tmp_path, module=module)
  assert loaded.output == network.output
  np.testing.assert_array_equal(apply(loaded, IMAGES), apply(network, IMAGES))


def test_the_head_that_is_not_chosen_is_observed_but_not_quantized() -> None:
  network = make_network(TwoHeads(), (8, 8, 3), EVALUATION, output="main")
  # Its BatchNorm still knows something of the data; its kernels would take the place of the last layer.
  assert list(kwjax.reference_moments(network)) == ["bn", "auxiliary_bn"]
  _, measured = observe(network, IMAGES)
  assert set(measured) == {"bn", "auxiliary_bn"}
  assert [layer.name for layer in matmul_layers(network)] == ["trunk", "main_head"]
  rules = kwjax.QuantRules.parse("4w4a", overrides={"last": "8w8a"})
  assert {name: rule.weight_bits for name, rule in rules.resolve(network).items()} == {"trunk": 4, "main_head": 8}
  ranges = kwjax.calibrate(network, IMAGES, rules, key=jax.random.key(0), steps=1, batch_size=16)
  student = kwjax.quantize(network, rules, ranges)
  assert float(jnp.abs(apply(student, IMAGES) - apply(network, IMAGES)).max()) > 1e-3
  other = network.replace(output="auxiliary")
  assert [layer.name for layer in matmul_layers(other)] == ["trunk", "mix", "auxiliary_head"]


@pytest.mark.slow
def test_two_heads_go_through_synthesis_and_distillation() -> None:
  network = make_network(TwoHeads("tuple"), (8, 8, 3), EVALUATION, output=0)
  config = kwjax.SynthesisConfig.for_network("bns+inception", 8).replace(steps=3, batch_size=8, init="uniform")
  samples = kwjax.synthesize(network, config, num_images=8, key=jax.random.key(0))
  bns = samples.history["bns"][0]
  assert bns[0] > bns[-1] > 0.0
  assert set(samples.labels.tolist()) <= set(range(5)), "targets are classes of the head that was chosen"
  rules = kwjax.QuantRules.parse("4w4a")
  ranges = kwjax.calibrate(network, samples.images, rules, key=jax.random.key(1), steps=1, batch_size=16)
  student = kwjax.quantize(network, rules, ranges)
  short = kwjax.DistillConfig(steps=2, batch_size=8, learning_rate=0.01, iq_weight=0.0)
  tuned = kwjax.distill(student, network, samples.images, short, key=jax.random.key(2))
  moved = jax.tree.map(
    lambda new, old: float(jnp.abs(new - old).max()), tuned.variables["params"], student.variables["params"]
  )
  assert moved["trunk"]["kernel"] > 0.0
  assert moved["main_head"]["kernel"] > 0.0
  assert moved["auxiliary_head"]["kernel"] == 0.0, "nobody looks at the other head"


@pytest.mark.parametrize(
  ("form", "output", "message"),
  [
    (
      "dict",
      None,
      r"returned a dict with the keys 'main', 'auxiliary'; say which .* Network\(\.\.\., output='main'\)",
    ),
    ("tuple", None, r"returned a tuple of 2 outputs; say which .* Network\(\.\.\., output=0\)"),
    ("nested", 1, r"returned a dict .* output=\(1, 'main'\)\)"),
    ("dict", "typo", r"TwoHeads has no output 'typo': its module returned a dict with the keys 'main', 'auxiliary'"),
    ("tuple", 2, r"has no output 2: its module returned a tuple of 2"),
    ("dict", ("main", "x"), r"has no output 'x': its module returned shape \(1, 5\)"),
    ("tuple", 1.5, r"output must be a key, an index"),
  ],
)
def test_a_wrong_choice_of_output_names_what_there_is(form: str, output: object, message: str) -> None:
  with pytest.raises(kwjax.KwjaxError, match=message):
    make_network(TwoHeads(form), (8, 8, 3), EVALUATION, output=output).apply(IMAGES)


class Widths(nn.Module):
  """Lists and a dict as attributes, as people write them; a Sequential as a block."""

  widths: list
  options: dict
  parts: list

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for width in self.widths:
      x = nn.Sequential([nn.Conv(width, self.options["kernel"]), nn.BatchNorm(use_running_average=True), nn.relu])(x)
    for part in self.parts:
      x = part(x)
    return x


def test_lists_and_dicts_among_the_attributes_do_not_matter() -> None:
  module = Widths([4, 6], {"kernel": [3, 3]}, [lambda x: x.mean((1, 2)), nn.Sequential([nn.Dense(3), nn.tanh])])
  network = make_network(module, (8, 8, 3), {})
  logits, measured = observe(network, IMAGES)
  assert len(measured) == 2
  # The module as it was given, with its lists: Flax itself needs no hash.
  expected = jax.jit(lambda variables, x: module.apply(variables, x))(network.variables, (IMAGES - 0.45) / 0.25)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
  assert len(matmul_layers(network)) == 3
  assert hash(network.module) == hash(network.replace(name="other").module)


def test_an_attribute_without_any_hash_is_named() -> None:
  class Shifted(nn.Module):
    shift: jax.Array

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
      return nn.Dense(2)(x.mean((1, 2)) + self.shift)

  with pytest.raises(kwjax.KwjaxError, match="attribute shift of module Shifted is a .*cannot be hashed"):
    make_network(Shifted(jnp.ones(3)), (8, 8, 3), {})


def test_a_sequential_is_a_block_like_any_other() -> None:
  class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
      for _ in range(2):
        x = nn.Sequential([nn.Conv(4, (3, 3), (2, 2)), nn.BatchNorm(use_running_average=True), nn.relu])(x)
      return nn.Dense(2)(x.mean((1, 2)))

  assert stage_outputs(make_network(Blocks(), (8, 8, 3), {})) == ("Sequential_0", "Sequential_1")


def test_a_mode_without_a_default_can_be_initialized() -> None:
  variables = initial_variables(SetupNet(), (8, 12, 1), key=jax.random.key(0))
  assert set(variables) == {"params", "batch_stats"}


class Half(nn.Module):
  """Computes in half precision, as its `dtype` says."""

  dtype: Any = jnp.bfloat16

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(nn.Conv(4, (3, 3), dtype=self.dtype)(x))
    return nn.Dense(3, dtype=self.dtype)(nn.relu(x).mean((1, 2)))


def test_frozen_dicts_and_half_precision() -> None:
  network = make_network(Half(), (8, 8, 3), EVALUATION)
  network = network.replace(variables=flax.core.freeze(network.variables))
  assert [layer.name for layer in matmul_layers(network)] == ["Conv_0", "Dense_0"]
  logits, measured = observe(network, IMAGES)
  _, expected = observe(network.replace(module=Half(jnp.float32)), IMAGES)
  assert logits.dtype == jnp.bfloat16
  # Eight significant bits in the values, but not in their statistics.
  assert measured["BatchNorm_0"].var.dtype == jnp.float32
  np.testing.assert_allclose(measured["BatchNorm_0"].var, expected["BatchNorm_0"].var, rtol=0.02)


class NormalizedRelu(nn.BatchNorm):
  """A BatchNorm with its activation inside."""

  @nn.compact
  def __call__(self, x, use_running_average=None):
    return nn.relu(super().__call__(x, use_running_average))


class Replaced(nn.BatchNorm):
  """A BatchNorm in name only."""

  @nn.compact
  def __call__(self, x, use_running_average=None):
    self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
    self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
    return 2 * x


class WithNorm(nn.Module):
  norm: type
  activation: Callable = lambda x: x

  @nn.compact
  def __call__(self, x, train=False):
    x = self.activation(self.norm(use_running_average=not train, name="norm")(nn.Conv(4, (3, 3), name="conv")(x)))
    return nn.Dense(3, name="head")(x.mean((1, 2)))


def test_what_a_subclass_does_around_batch_norm_is_its_own():
  plain, inside = (
    random_network(WithNorm(*options), image_shape=(6, 6, 3), seed=2)
    for options in ((nn.BatchNorm, nn.relu), (NormalizedRelu,))
  )
  images = jax.random.uniform(jax.random.key(0), (4, 6, 6, 3))
  observe = jax.jit(kwjax.observe)
  (expected, moments), (found, same) = observe(plain, images), observe(inside, images)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  np.testing.assert_allclose(found, inside.apply(images), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(same["norm"].mean, moments["norm"].mean)


def test_a_batch_norm_that_never_calls_its_own_is_refused():
  network = random_network(WithNorm(Replaced), image_shape=(6, 6, 3), seed=2)
  with pytest.raises(KwjaxError, match=r"layer norm is a Replaced, .* never calls super\(\)\.__call__"):
    kwjax.observe(network, jnp.zeros((2, 6, 6, 3)))
