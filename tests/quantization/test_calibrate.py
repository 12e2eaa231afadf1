"""Calibration against a NumPy reimplementation with the same draws, its shortcut, and what it refuses."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax import intercept, kernels
from kwjax.errors import DataError, Interrupted, KwjaxError, NonFiniteError
from kwjax.models import get_model
from kwjax.quantization import QuantRules, Ranges, RangeTable, calibrate, draws, observe_ranges, ranges_from
from kwjax.quantization.extremes import recording_extremes

LAYERS = ["stem", "depthwise", "pointwise", "classifier"]
KEY = jax.random.key(11)


def layer_inputs(network, images):
  """Inputs of every layer, by capturing intermediates: the outputs of the layers in between."""
  x = (images - 0.45) / 0.25
  _, state = network.module.apply(network.variables, x, capture_intermediates=True, mutable=["intermediates"])
  out = {name: value["__call__"][0] for name, value in state["intermediates"].items() if isinstance(value, dict)}
  stem, depthwise = jax.nn.relu(out["stem_bn"]), jax.nn.relu(out["depthwise_bn"])
  pooled = (stem + out["pointwise_bn"]).mean((1, 2))
  return {"stem": x, "depthwise": stem, "pointwise": depthwise, "classifier": pooled}


@pytest.mark.parametrize("ranges", ["sample", "chunk"])
def test_matches_numpy_with_the_same_draws(network, images, ranges):
  rules = QuantRules.parse("4w4a", ranges=ranges)
  found = calibrate(network, images, rules, key=KEY, steps=3, batch_size=12, chunk=4)
  inputs = layer_inputs(network, images)
  index = draws(KEY, steps=3, batch_size=12, count=12)
  assert list(found) == LAYERS
  for name in LAYERS:
    lows, highs = [], []
    for step in range(3):
      for chunk in range(3):
        rows = np.asarray(inputs[name])[index[step, 4 * chunk : 4 * chunk + 4]].reshape(4, -1)
        lows.append(rows.min(1).mean() if ranges == "sample" else rows.min())
        highs.append(rows.max(1).mean() if ranges == "sample" else rows.max())
    np.testing.assert_allclose(found[name].lo, np.mean(lows), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[name].hi, np.mean(highs), rtol=1e-5, atol=1e-6)


def test_extremes_by_fewer_products_are_those_of_the_network_to_a_hundred_thousandth(make_network):
  # Layers of 32 channels, which are Winograd's while extremes are observed and never where a network answers.
  network = make_network(get_model("resnet20", num_classes=10), (16, 16, 3))
  images = np.random.default_rng(3).random((6, 16, 16, 3), np.float32)
  with kernels.enabled(True):
    table = observe_ranges(network, images)
  _, recorded = jax.jit(recording_extremes(network.forward, network))(network.variables, images)
  exact = {name: calls[0] for name, calls in intercept.collect(recorded, "extremes").items()}
  last = list(table)[-1]
  assert set(exact) == set(table)
  for name, (lo, hi) in exact.items():
    np.testing.assert_allclose(table[name].lo, lo, atol=3e-5 * float(jnp.abs(lo).max()), err_msg=name)
    np.testing.assert_allclose(table[name].hi, hi, atol=3e-5 * float(jnp.abs(hi).max()), err_msg=name)
  assert (np.asarray(table[last].hi) != np.asarray(exact[last].hi)).any(), "no layer was Winograd's"


def test_draws_are_with_replacement_and_differ_by_step_and_key():
  index = draws(KEY, steps=50, batch_size=40, count=30)
  assert index.shape == (50, 40)
  assert (index.min(), index.max()) == (0, 29)
  assert len({row.tobytes() for row in index}) == 50
  assert (index != draws(jax.random.key(12), steps=50, batch_size=40, count=30)).any()
  # The first steps do not depend on how many follow.
  np.testing.assert_array_equal(index[:5], draws(KEY, steps=5, batch_size=40, count=30))
  counts = np.bincount(index.ravel(), minlength=30)
  # 66.7 expected, standard deviation 8.
  assert counts.min() > 30
  assert counts.max() < 110


@pytest.mark.parametrize("ranges", ["sample", "chunk"])
@pytest.mark.parametrize("observe", ["float", "weights"])
def test_table_equals_forwarding_every_draw(network, images, ranges, observe):
  rules = QuantRules.parse("3w4a", ranges=ranges)
  options = {"key": KEY, "steps": 3, "batch_size": 8, "chunk": 4, "observe": observe}
  short = calibrate(network, images, rules, **options)
  long = calibrate(network, images, rules, augment=lambda key, batch: batch, **options)
  assert list(short) == list(long)
  for name in short:
    np.testing.assert_allclose(short[name], long[name], rtol=1e-5, atol=1e-6)


def test_augmentation_is_applied_with_a_new_key_each_step(network, images):
  seen = []

  def augment(key, batch):
    seen.append(np.asarray(jax.random.key_data(key)).tobytes())
    return jnp.zeros_like(batch) + len(seen) / 10

  found = calibrate(network, images, QuantRules.parse("4w4a"), key=KEY, steps=3, batch_size=4, chunk=4, augment=augment)
  assert len(set(seen)) == 3
  np.testing.assert_allclose(found["stem"].lo, (0.2 - 0.45) / 0.25, rtol=1e-5)


def test_one_table_serves_several_rules(network, images):
  table = observe_ranges(network, images, batch_size=5)
  assert table.count == 12
  for text, ranges in (("8w8a", "sample"), ("4w4a", "chunk")):
    rules = QuantRules.parse(text, ranges=ranges)
    found = ranges_from(table, rules, key=KEY, steps=2, batch_size=16)
    expected = calibrate(network, images, rules, key=KEY, steps=2, batch_size=16)
    for name in expected:
      np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-6)


def test_batch_size_of_the_pass_does_not_matter(network, images):
  whole = observe_ranges(network, images, batch_size=64)
  for batch_size in (1, 5, 12):
    parts = observe_ranges(network, np.asarray(images), batch_size=batch_size)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parts, whole)


def test_several_devices_give_what_one_gives(network, images):
  whole = observe_ranges(network, images)
  for devices in (3, 8):
    split = observe_ranges(network, images[:11], batch_size=5, devices=devices)
    assert split.count == 11
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[:11], rtol=1e-5, atol=1e-5), split, whole)


def test_it_stops_between_batches(network, images):
  with pytest.raises(Interrupted):
    observe_ranges(network, images, batch_size=5, should_stop=lambda: True)


def test_quantized_weights_change_what_is_observed(network, images):
  rules = QuantRules.parse("2w2a")
  plain, quantized = observe_ranges(network, images), observe_ranges(network, images, rules=rules)
  np.testing.assert_array_equal(plain["stem"].hi, quantized["stem"].hi)
  assert float(jnp.abs(plain["classifier"].hi - quantized["classifier"].hi).max()) > 1e-2


def test_layer_called_twice_gets_the_range_of_both_inputs(make_network):
  import flax.linen as nn

  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      shared = nn.Dense(3, use_bias=False, name="shared")
      return shared(shared(x)).mean((1, 2))

  variables = {"params": {"shared": {"kernel": 10.0 * jnp.eye(3)}}}
  network = make_network(Twice(), (2, 2, 3), variables)
  images = jax.random.uniform(KEY, (3, 2, 2, 3))
  table = observe_ranges(network, images)
  x = (np.asarray(images) - 0.45).reshape(3, -1) / 0.25
  np.testing.assert_allclose(table["shared"].hi, np.maximum(x.max(1), 10 * x.max(1)), rtol=1e-5)
  np.testing.assert_allclose(table["shared"].lo, np.minimum(x.min(1), 10 * x.min(1)), rtol=1e-5)


def test_ranges_are_a_pytree_and_survive_json_and_npz(network, images, tmp_path):
  table = observe_ranges(network, images)
  np.savez(tmp_path / "table.npz", **table.to_arrays())
  with np.load(tmp_path / "table.npz", allow_pickle=False) as arrays:
    again = RangeTable.from_arrays(dict(arrays))
  assert list(again) == LAYERS
  jax.tree.map(np.testing.assert_array_equal, again, table)

  ranges = ranges_from(table, QuantRules.parse("4w4a"), key=KEY, steps=2, batch_size=16)
  stacked = Ranges({**ranges, "scanned": (jnp.array([0.1, -3e-8]), jnp.array([1 / 3, 7e7]))})
  back = Ranges.from_json(json.loads(json.dumps(stacked.to_json())))
  assert list(back) == [*LAYERS, "scanned"]
  jax.tree.map(np.testing.assert_array_equal, back, stacked)
  doubled = jax.jit(lambda r: jax.tree.map(lambda v: 2 * v, r))(ranges)
  assert isinstance(doubled, Ranges)
  assert list(doubled) == LAYERS


def test_bad_ranges_text_is_refused():
  for bad in ({"a": [1.0]}, {"a": 3}, {"a": ["x", "y"]}, {"a": [None, 1.0]}):
    with pytest.raises(KwjaxError, match="range of layer a must be a pair"):
      Ranges.from_json(bad)
  with pytest.raises(KwjaxError, match="a:hi"):
    Ranges.from_arrays({"a:lo": np.zeros(())})


def test_bad_images_are_refused(network, images):
  rules = QuantRules.parse("4w4a")
  run = lambda data, **options: calibrate(network, data, rules, key=KEY, steps=1, batch_size=16, **options)
  cases = {
    "at least one image": images[:0],
    r"takes images of shape \(n, 8, 8, 3\), found \(12, 4, 8, 3\)": images[:, :4],
    r"found \(8, 8, 3\)": images[0],
    "divide 8 bit images by 255": np.zeros((2, 8, 8, 3), np.uint8),
    r"image 3 .* NaN or infinity \(2 do\)": images.at[3, 0, 0, 0].set(jnp.nan).at[5, 1, 1, 1].set(jnp.inf),
  }
  for message, data in cases.items():
    for options in ({}, {"augment": lambda key, batch: batch}):
      with pytest.raises(DataError, match=message):
        run(data, **options)


def test_bad_protocol_is_refused(network, images):
  rules = QuantRules.parse("4w4a")
  with pytest.raises(KwjaxError, match="batch size 20, chunk 16"):
    calibrate(network, images, rules, key=KEY, batch_size=20)
  with pytest.raises(KwjaxError, match="steps 0"):
    calibrate(network, images, rules, key=KEY, steps=0)
  with pytest.raises(KwjaxError, match="observe must be"):
    calibrate(network, images, rules, key=KEY, observe="inputs")


def test_overflowing_layer_is_named(network, images):
  params = network.variables["params"]
  huge = {**params, "depthwise": jax.tree.map(lambda v: v * 1e38, params["depthwise"])}
  with pytest.raises(NonFiniteError, match="input of layer pointwise"):
    observe_ranges(network.replace(variables={**network.variables, "params": huge}), images)
