"""Accuracy and agreement against NumPy, ties, masked padding, NaN, and the number of compilations."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from kwjax.errors import DataError, Interrupted, NonFiniteError
from kwjax.runtime.data.images import array_data
from kwjax.runtime.devices import batch_sizes
from kwjax.runtime.evaluate import Accuracy, agreement, evaluate, predict, score, wilson_interval

TRACES: list[str] = []


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
  """Logits are a linear function of the flattened image."""

  weight: jax.Array
  bias: jax.Array
  name: str = dataclasses.field(default="linear", metadata={"static": True})

  def apply(self, images: jax.Array) -> jax.Array:
    TRACES.append(self.name)
    return images.reshape(len(images), -1) @ self.weight + self.bias


def _linear(classes: int = 7, seed: int = 0, name: str = "linear") -> Linear:
  rng = np.random.default_rng(seed)
  weight, bias = rng.normal(size=(12, classes)), rng.normal(size=classes)
  return Linear(jnp.asarray(weight, jnp.float32), jnp.asarray(bias, jnp.float32), name)


def _images(count: int = 23, seed: int = 1) -> np.ndarray:
  return np.random.default_rng(seed).random((count, 2, 2, 3), dtype=np.float32)


def _logits(network: Linear, images: np.ndarray) -> np.ndarray:
  return images.reshape(len(images), -1).astype(np.float64) @ np.asarray(network.weight, np.float64) + network.bias


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_accuracy_is_that_of_sorting_the_logits(batch_size: int) -> None:
  network, images = _linear(), _images()
  labels = np.random.default_rng(2).integers(0, 7, len(images))
  order = np.argsort(-_logits(network, images), axis=1)
  top1, top5 = (order[:, 0] == labels).mean(), (order[:, :5] == labels[:, None]).any(axis=1).mean()
  assert 0 < top1 < top5 < 1
  expected = Accuracy(pytest.approx(top1), pytest.approx(top5), 23)
  assert evaluate(network, images, labels, batch_size=batch_size) == expected
  assert evaluate(network, jnp.asarray(images), jnp.asarray(labels), batch_size=batch_size) == expected
  assert evaluate(network, array_data(images, labels), batch_size=batch_size) == expected


def test_the_padding_of_the_last_batch_is_not_counted() -> None:
  # Black padding has label 0, and this network calls everything class 0.
  network = dataclasses.replace(_linear(), weight=jnp.zeros((12, 7)), bias=-jnp.arange(7.0))
  assert evaluate(network, _images(5), np.array([0, 1, 1, 1, 6]), batch_size=4) == Accuracy(0.2, 0.8, 5)


def test_equal_logits_count_once() -> None:
  network = dataclasses.replace(_linear(), weight=jnp.zeros((12, 7)), bias=jnp.zeros(7))
  assert evaluate(network, _images(7), np.arange(7)) == Accuracy(1 / 7, 5 / 7, 7)


def test_top5_is_left_out_where_it_says_nothing() -> None:
  assert evaluate(_linear(5), _images(), np.zeros(23, np.int32)).top5 is None
  assert evaluate(_linear(6), _images(), np.zeros(23, np.int32)).top5 is not None


def test_bad_input_is_refused() -> None:
  network, images = _linear(), _images()
  with pytest.raises(DataError, match="needs labels"):
    evaluate(network, images)
  with pytest.raises(DataError, match="needs labels"):
    evaluate(network, array_data(images))
  with pytest.raises(DataError, match=r"expected 23 integer labels, found int64\[22\]"):
    evaluate(network, images, np.zeros(22, np.int64))
  with pytest.raises(DataError, match=r"at least 0 and below 7, found 7\.\.7"):
    evaluate(network, images, np.full(23, 7))
  with pytest.raises(DataError, match="at least one image"):
    agreement(network, network, images[:0])


def test_nan_logits_stop_the_evaluation() -> None:
  network, images = _linear(), _images()
  broken = dataclasses.replace(network, bias=network.bias.at[3].set(jnp.nan), name="broken")
  with pytest.raises(NonFiniteError, match="broken returns NaN or infinite logits for 4 of 4 images"):
    evaluate(broken, images, np.zeros(23, np.int32), batch_size=4)
  for pair in ((broken, network), (network, broken)):
    with pytest.raises(NonFiniteError, match="broken returns NaN"):
      agreement(*pair, images)


def test_agreement_is_its_formulas_in_float64() -> None:
  reference, network, images = _linear(), _linear(seed=5), _images()
  a, b = _logits(reference, images), _logits(network, images)
  p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (a, b))
  found = agreement(network, reference, images, batch_size=4)
  assert found.count == 23
  assert 0 < found.top1 < 1
  assert found.top1 == pytest.approx((a.argmax(1) == b.argmax(1)).mean())
  assert found.kl == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-5)
  assert found.sqnr_db == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), rel=1e-5)
  # The divergence is not symmetric: the reference comes first.
  assert found.kl != pytest.approx(agreement(reference, network, images).kl, rel=1e-3)


def test_a_network_agrees_with_itself() -> None:
  found = agreement(_linear(), _linear(), array_data(_images()))
  assert (found.top1, found.kl, found.sqnr_db) == (1.0, 0.0, math.inf)


def test_a_known_noise_has_the_known_ratio() -> None:
  reference = _linear()
  network = dataclasses.replace(reference, weight=reference.weight * 0.9, bias=reference.bias * 0.9)
  assert agreement(network, reference, _images()).sqnr_db == pytest.approx(20, abs=1e-4)


@pytest.mark.parametrize("devices", [3, 8])
def test_several_devices_give_what_one_gives(devices: int) -> None:
  network, reference, images = _linear(), _linear(seed=5), _images()
  labels = np.random.default_rng(2).integers(0, 7, len(images))
  assert evaluate(network, images, labels, batch_size=5, devices=devices) == evaluate(network, images, labels)
  one, several = (agreement(network, reference, images, batch_size=7, devices=n) for n in (1, devices))
  assert dataclasses.astuple(several) == pytest.approx(dataclasses.astuple(one), rel=1e-5)


def test_one_pass_gives_both_scores() -> None:
  network, reference, images = _linear(name="one pass"), _linear(seed=5), _images()
  labels = np.random.default_rng(2).integers(0, 7, len(images))
  expected = predict(reference, images, batch_size=8)
  forwarded = []

  @jax.tree_util.register_dataclass
  @dataclasses.dataclass(frozen=True)
  class Counted(Linear):
    def apply(self, images: jax.Array) -> jax.Array:
      jax.debug.callback(lambda x: forwarded.append(len(x)), images)
      return super().apply(images)

  counted = Counted(network.weight, network.bias)
  found = score(counted, images, labels, expected, batch_size=8)
  jax.effects_barrier()  # callbacks run beside the program
  assert forwarded == [8, 8, 8]
  assert found.accuracy == evaluate(network, images, labels)
  assert dataclasses.astuple(found.agreement) == pytest.approx(
    dataclasses.astuple(agreement(network, reference, images)), rel=1e-5
  )
  assert score(network, images) == (None, None)


def test_it_stops_between_batches() -> None:
  asked = []

  def stop() -> bool:
    asked.append(True)
    return len(asked) == 3

  with pytest.raises(Interrupted):
    predict(_linear(), _images(), batch_size=2, should_stop=stop)
  assert len(asked) == 3


@pytest.mark.parametrize("stored", [False, True], ids=["array", "ImageData"])
def test_large_images_are_forwarded_in_whole_parts(monkeypatch: pytest.MonkeyPatch, stored: bool) -> None:
  network, images = _linear(), _images()
  expected = predict(network, images)
  monkeypatch.setattr(batch_sizes, "_PART_PIXELS", 2 * 2 * 4)
  asked: list[bool] = []
  found = predict(
    network, array_data(images) if stored else images, batch_size=13, should_stop=lambda: bool(asked.append(True))
  )
  assert len(asked) == 2  # 23 images, 3 parts of 4 at a time
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_networks_of_one_structure_share_one_compilation() -> None:
  images, labels = _images(), np.zeros(23, np.int32)
  before = len(TRACES)
  for seed in range(3):
    evaluate(_linear(seed=seed, name="traced"), images, labels, batch_size=4)
  assert len(TRACES) - before == 1


def test_wilson_interval_against_published_values() -> None:
  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
  for successes, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
    found = wilson_interval(successes, count)
    assert found == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
  assert wilson_interval(29, 29) == (pytest.approx(0.8830, abs=5e-5), 1.0)
  low, high = wilson_interval(50, 100, 0.99)
  assert low < wilson_interval(50, 100)[0]
  assert low + high == pytest.approx(1)
  for successes, count in ((0, 1), (1, 3), (17, 1017), (999, 1000)):
    found = scipy.stats.binomtest(successes, count).proportion_ci(method="wilson")
    assert wilson_interval(successes, count) == pytest.approx((found.low, found.high), abs=1e-12)
  # A mean over seeds is no whole number of images, which scipy refuses.
  assert wilson_interval(2, 10)[0] < wilson_interval(2.5, 10)[0] < wilson_interval(3, 10)[0]
  for bad in ((-1, 10), (11, 10), (0, 0)):
    with pytest.raises(DataError, match="no interval"):
      wilson_interval(*bad)
