"""Ranges from histograms against numpy, exhaustive search and the definition of KL; histograms against numpy's."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.errors import KwjaxError, RuleError
from kwjax.quantization import (
  Histogram,
  QuantRules,
  activation_grid,
  calibrate,
  entropy_range,
  fake_quant,
  histogram_ranges,
  mse_range,
  observe_histograms,
  observe_ranges,
  percentile_range,
  ranges_from,
)
from kwjax.quantization.histograms import merge
from kwjax.quantization.range_methods import quantized_divergence

KEY = jax.random.key(5)


def relu_values() -> np.ndarray:
  """Half of them exactly 0, the others with a long tail."""
  return np.maximum(np.random.default_rng(0).laplace(size=10_000), 0.0)


def signed_values() -> np.ndarray:
  return np.random.default_rng(1).laplace(size=10_000) * 2 + 1


def error_of(values: np.ndarray, lo: float, hi: float, bits: int) -> float:
  quantized = fake_quant(jnp.asarray(values, jnp.float32), *activation_grid(jnp.float32(lo), jnp.float32(hi), bits))
  return float(np.square(values - np.asarray(quantized, np.float64)).sum())


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("values", [relu_values(), signed_values(), -relu_values()])
def test_percentile_is_numpys_within_a_bin(values, percent):
  histogram = Histogram.of(values)
  width = (values.max() - values.min()) / histogram.counts.size
  found = percentile_range(histogram, percent)
  # In the far tail bins are empty: any value between two neighbours is a percentile.
  for method, sign in (("lower", -1), ("higher", 1)):
    bound = np.percentile(values, [100 - percent, percent], method=method)
    assert (sign * (bound - found) >= -1.01 * width).all()


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("values", [relu_values(), signed_values()])
def test_mse_range_is_as_good_as_exhaustive_search(values, bits):
  lo, hi = mse_range(Histogram.of(values), bits)
  shares = np.linspace(0.02, 1, 25)
  ends = [(values.min() * a, values.max() * b) for a in (shares if values.min() < 0 else [1]) for b in shares]
  best = min(error_of(values, *pair, bits) for pair in ends)
  assert error_of(values, lo, hi, bits) < 1.02 * best
  # Extremes are far off: a test that only compared with them would not notice a poor search.
  if bits <= 4:
    assert best < 0.8 * error_of(values, values.min(), values.max(), bits)


def test_fewer_bits_cut_more_off():
  histogram = Histogram.of(relu_values())
  highest = [mse_range(histogram, bits)[1] for bits in (2, 4, 6, 8)]
  assert highest == sorted(highest)
  assert highest[0] < 0.5 * highest[-1]


def test_divergence_is_its_definition():
  """Bin by bin and level by level, for values that are all positive."""
  values = np.abs(np.random.default_rng(3).standard_normal(5000)) + 1e-9
  counts, edges = np.histogram(values, 64, (0, values.max()))
  histogram = Histogram(edges[0], edges[-1], np.int64(0), counts)
  for kept in (9, 20, 40, 64):
    p, q = (counts[:kept].astype(float) for _ in range(2))
    p[np.flatnonzero(p)[-1]] += counts[kept:].sum()
    level = np.round((edges[:kept] + edges[1 : kept + 1]) / 2 / edges[kept] * 15)
    for k in range(16):
      members = (level == k) & (q > 0)
      q[members] = q[members].mean() if members.any() else 0
    p, q = p[p > 0] / p.sum(), q[p > 0] / q.sum()
    expected = np.sum(p * np.log(p / q))
    assert quantized_divergence(histogram, 0.0, edges[kept], 4) == pytest.approx(expected, rel=1e-9)


def test_entropy_range_is_the_best_of_its_candidates():
  histogram = Histogram.of(relu_values())
  lo, hi = entropy_range(histogram, 4)
  highest = float(histogram.hi)
  others = [quantized_divergence(histogram, 0.0, highest * share, 4) for share in np.linspace(1 / 16, 1, 128)]
  assert lo == 0
  assert quantized_divergence(histogram, lo, hi, 4) == min(others)
  assert hi < 0.9 * highest


def test_exact_zeros_do_not_count_where_every_grid_keeps_them():
  values = relu_values()
  with_zeros, without = Histogram.of(values), Histogram.of(values[values > 0])._replace(lo=np.float64(0))
  without = without._replace(counts=with_zeros.counts)
  assert with_zeros.zeros == (values == 0).sum()
  assert with_zeros.counts.sum() == (values > 0).sum()
  assert mse_range(with_zeros, 4) == mse_range(without._replace(zeros=np.int64(0)), 4)
  assert entropy_range(with_zeros, 4) == entropy_range(without._replace(zeros=np.int64(0)), 4)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_constant_inputs_have_a_range(value):
  histogram = Histogram.of(np.full(10, value))
  for lo, hi in (mse_range(histogram, 4), entropy_range(histogram, 4), percentile_range(histogram)):
    assert np.isfinite([lo, hi]).all()
    assert lo <= hi


def test_streamed_histograms_are_numpys(network, images):
  table = observe_ranges(network, images)
  found = observe_histograms(network, images, table, bins=64, batch_size=5, devices=2)
  assert list(found) == list(table)
  inputs = np.asarray((images - 0.45) / 0.25, np.float64)
  stem = found["stem"]
  assert stem.counts.sum() + stem.zeros == inputs.size
  expected = np.histogram(inputs, 64, (float(stem.lo), float(stem.hi)))[0]
  # float32 places a value beside the edge of a bin on either side.
  assert np.abs(stem.counts - expected).sum() <= 4
  assert found["depthwise"].zeros > 0  # behind a ReLU
  halves = [observe_histograms(network, part, table, bins=64) for part in (images[:5], images[5:])]
  for name, histogram in found.items():
    jax.tree.map(np.testing.assert_array_equal, merge(halves[0][name], halves[1][name]), histogram)
  with pytest.raises(KwjaxError, match="other bins"):
    merge(stem, found["depthwise"])


def test_calibrate_reads_ranges_by_the_bits_of_the_layer(network, images):
  rules = QuantRules.parse("4w4a", overrides={"depthwise": "4w2a", "classifier": "4w32a"}, ranges="mse")
  found = calibrate(network, images, rules, key=KEY)
  table = observe_ranges(network, images)
  histograms = observe_histograms(network, images, table)
  assert found["depthwise"].hi == pytest.approx(mse_range(histograms["depthwise"], 2)[1])
  assert found["pointwise"].hi == pytest.approx(mse_range(histograms["pointwise"], 4)[1])
  assert found["classifier"].hi == pytest.approx(float(table["classifier"].hi.max()))
  # Nothing is drawn.
  other = calibrate(network, images, rules, key=jax.random.key(9), steps=1, batch_size=2, chunk=1)
  assert jax.tree.all(jax.tree.map(np.array_equal, found, other))


@pytest.mark.parametrize("form", ["unrolled", "scan"])
def test_stacked_layers_have_ranges_of_their_own(stacked_networks, form):
  images = jax.random.uniform(jax.random.key(2), (4, 6, 6, 6))
  found = calibrate(stacked_networks[form], images, QuantRules.parse("4w4a", ranges="percentile:99"), key=KEY)
  expected = calibrate(stacked_networks["unrolled"], images, QuantRules.parse("4w4a", ranges="percentile:99"), key=KEY)
  for index in range(3):
    own = found["blocks/conv"].hi[index] if form == "scan" else found[f"block{index}/conv"].hi
    np.testing.assert_allclose(own, expected[f"block{index}/conv"].hi, rtol=1e-3)


def test_augmented_batches_are_counted_together(network, images):
  rules = QuantRules.parse("4w4a", ranges="percentile:99")
  options = {"key": KEY, "steps": 2, "batch_size": 12, "chunk": 4}
  seen = []

  def augment(key, batch):
    seen.append(np.asarray(images))
    return images

  found = calibrate(network, images, rules, augment=augment, **options)
  assert len(seen) == 4  # two passes
  for name, interval in calibrate(network, images, rules, **options).items():
    np.testing.assert_allclose(found[name], interval, rtol=1e-5, atol=1e-6)


def test_options_are_read_and_refused(network, images):
  rules = QuantRules.parse("4w4a", ranges="percentile:99.9", weights_range="mse")
  assert rules.describe() == "4w4a, weights affine, weight ranges mse, ranges percentile:99.9"
  assert QuantRules.from_json(json.loads(json.dumps(rules.to_json()))) == rules
  # Files and results of versions without the option stay valid.
  for text in ("median", "percentile:", "percentile:x", "percentile:20", "percentile:101", "mse:3", "sample:2"):
    with pytest.raises(RuleError, match="range method"):
      QuantRules.parse("4w4a", ranges=text)
  with pytest.raises(RuleError, match="weight range 'entropy'"):
    QuantRules.parse("4w4a", weights_range="entropy")
  table = observe_ranges(network, images)
  with pytest.raises(KwjaxError, match="needs histograms"):
    ranges_from(table, rules, key=KEY)
  with pytest.raises(RuleError, match="sample"):
    histogram_ranges({}, {}, "sample")
