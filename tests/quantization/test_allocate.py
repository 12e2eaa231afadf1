"""Bits by layer: the best choice against trying all, sensitivities against the real copy, budgets kept."""

from __future__ import annotations

import itertools
import pathlib

import jax
import numpy as np
import pytest

from kwjax.analysis.allocation_figures import bits_by_layer, size_curves
from kwjax.errors import KwjaxError, RuleError
from kwjax.quantization import QuantRules, calibrate, quantize
from kwjax.quantization.allocate import Budget, allocate_bits, allocate_from, best_bits
from kwjax.quantization.sensitivity import measure_sensitivity
from kwjax.runtime.evaluate import agreement

KEY = jax.random.key(3)


@pytest.mark.parametrize(("mean", "units"), [(2.0, 200_000), (2.5, 200_000), (3.7, 400), (4.0, 200_000), (8.0, 400)])
def test_best_bits_are_those_of_trying_all(mean, units):
  random = np.random.default_rng(int(10 * mean))
  sizes = [16 * int(n) for n in random.integers(1, 60, 5)]
  candidates = (2, 3, 4, 6, 8)
  costs = [{b: float(random.exponential() * 4.0**-b) for b in candidates} for _ in sizes]
  every = list(itertools.product(candidates, repeat=5))

  def cheapest(room: float) -> float:
    return min(cost_of(chosen) for chosen in every if np.dot(chosen, sizes) <= room + 1e-9)

  def cost_of(chosen: tuple[int, ...] | list[int]) -> float:
    return sum(cost[b] for cost, b in zip(costs, chosen, strict=True))

  found, room = best_bits(costs, sizes, mean, units=units), mean * sum(sizes)
  assert np.dot(found, sizes) <= room + 1e-9
  assert cost_of(found) >= cheapest(room) * (1 - 1e-9)
  # Sizes that are rounded up hide what would use the last unit of each layer, and nothing else.
  lost = 0 if units == 200_000 else 6 * room / units
  assert cost_of(found) <= cheapest(max(room - lost, 2 * sum(sizes))) * (1 + 1e-9)


def test_what_does_not_fit_is_refused():
  with pytest.raises(RuleError, match="mean of 2.5 or less: the fewest are 3"):
    best_bits([{3: 0.0, 4: 0.0}], [10], 2.5)
  for text in ("4", "4w", "w4a", "1w4a", "9w4a", "4wxa", "4w4", "1.2.3w4a", "0kBw4a", "330kB", "330GBw4a", "330kBw9a"):
    with pytest.raises(RuleError, match="budget is mean bits"):
      Budget.parse(text)
  assert Budget.parse("3.5w32a") == Budget(3.5, None)
  assert Budget.parse("1.2MBw4a") == Budget(None, 4.0, 1200.0)


def test_a_size_is_mean_bits():
  assert Budget.parse("330kBw4a").in_bits(660_000) == Budget(4.0, 4.0)
  assert Budget.parse("9MBw32a").in_bits(660_000) == Budget(8.0, None), "more than 8 bits a weight buy nothing"
  with pytest.raises(RuleError, match=r"100 kB are 1.21 bits for each of 660000 weights: at least 2, 165 kB"):
    Budget.parse("100kBw4a").in_bits(660_000)


@pytest.fixture(scope="module")
def allocation(network, images):
  base = QuantRules.parse("8w8a")
  return allocate_bits(network, images, budget="4w4a", candidates=(2, 4, 8), rules=base, key=KEY, batch_size=12)


def test_sensitivity_is_the_divergence_of_a_copy_with_one_layer_quantized(network, images, allocation):
  for bits, side in (("2w32a", "weights"), ("32w2a", "activations")):
    rules = QuantRules.parse("float", overrides={"pointwise": bits})
    copy = quantize(network, rules, calibrate(network, images, rules, key=KEY))
    expected = agreement(copy, network, images).kl
    assert getattr(allocation.sensitivity["pointwise"], side)[2] == pytest.approx(expected, rel=1e-3, abs=1e-6)
  found = allocation.sensitivity["stem"]
  assert (found.parameters, found.inputs) == (3 * 3 * 3 * 8, 8 * 8 * 3)
  assert found.weights[2] > found.weights[4] > found.weights[8]


def test_budget_is_kept_and_beats_equal_bits(network, images, allocation):
  assert allocation.mean_weight_bits <= 4 + 1e-9
  assert allocation.mean_activation_bits <= 4 + 1e-9
  resolved = allocation.rules.resolve(network)
  sizes = {name: s.parameters for name, s in allocation.sensitivity.items()}
  mean = sum(resolved[n].weight_bits * size for n, size in sizes.items()) / sum(sizes.values())
  assert mean == pytest.approx(allocation.mean_weight_bits)
  points = {point.bits: point for point in allocation.curve}
  assert points[4.0].predicted <= points[4.0].uniform
  predicted = [point.predicted for point in allocation.curve]
  assert predicted == sorted(predicted, reverse=True)
  copy = quantize(network, allocation.rules, calibrate(network, images, allocation.rules, key=KEY))
  assert np.isfinite(jax.jit(lambda c, x: c.apply(x))(copy, images)).all()


def test_a_size_is_kept(network, allocation):
  bytes_at_4 = sum(s.parameters for s in allocation.sensitivity.values()) / 2
  found = allocate_from(
    network, allocation.sensitivity, budget=f"{bytes_at_4 / 1000}kBw4a", rules=QuantRules.parse("8w8a")
  )
  assert found.rules == allocation.rules
  assert found.curve == allocation.curve


def test_a_side_without_budget_keeps_the_bits_of_the_rules(network, allocation):
  rules = QuantRules.parse("8w6a", overrides={"stem": "8w3a"})
  found = allocate_from(network, allocation.sensitivity, budget="4w32a", rules=rules)
  activations = {name: rule.activation_bits for name, rule in found.rules.resolve(network).items()}
  assert activations == {"stem": 3, "depthwise": 6, "pointwise": 6, "classifier": 6}
  with pytest.raises(RuleError, match="candidates"):
    allocate_bits(network, np.zeros((1, 8, 8, 3), np.float32), budget="4w4a", candidates=(1, 4), key=KEY)


def test_sensitivity_does_not_depend_on_batches_and_devices(network, images, allocation):
  rules = QuantRules.parse("8w8a")
  found = measure_sensitivity(network, images[:11], (2,), rules, key=KEY, batch_size=4, devices=3)
  expected = measure_sensitivity(network, images[:11], (2,), rules, key=KEY, batch_size=11)
  for name, layer in expected.items():
    assert found[name].weights[2] == pytest.approx(layer.weights[2], rel=1e-3, abs=1e-7)
    assert found[name].activations[2] == pytest.approx(layer.activations[2], rel=1e-3, abs=1e-7)


def test_stacked_layers_are_refused(stacked_networks):
  images = np.zeros((2, 6, 6, 6), np.float32)
  with pytest.raises(KwjaxError, match="blocks/conv is stacked"):
    allocate_bits(stacked_networks["scan"], images, budget="4w4a", key=KEY)


def test_pictures(tmp_path: pathlib.Path, allocation):
  curves = {
    "by layer": [(p.kilobytes, p.predicted) for p in allocation.curve],
    "equal bits": [(p.kilobytes, p.uniform) for p in allocation.curve],
  }
  assert size_curves(curves, tmp_path / "curve.png", label="KL (nats)", logarithmic=True).stat().st_size > 5000
  bits = {name: (rule.weights, rule.activations) for name, rule in allocation.rules.overrides}
  assert bits_by_layer(bits, tmp_path / "bits.png").stat().st_size > 5000
  with pytest.raises(KwjaxError, match="no value"):
    size_curves({"a": [(1.0, None)]}, tmp_path / "none.png", label="x")
