"""A reconstruction from end to end on small networks: what it returns, and that nothing about the machine matters."""

from __future__ import annotations

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest

import kwjax
from kwjax.errors import CheckpointError, Interrupted, KwjaxError, WeightsError
from kwjax.network import Network
from kwjax.quantization import QuantizedNetwork
from kwjax.quantization.wrap import kernel_path
from kwjax.reconstruction import ReconstructConfig, describe, reconstruct, reconstruct_with_report
from kwjax.reconstruction.units import find_units
from tests.foreign.conftest import STYLES, make_network
from tests.reconstruction.conftest import student_of

CONFIG = ReconstructConfig(iterations=200, batch_size=8, scale_rate=0.0)
KEY = jax.random.key(4)


@pytest.fixture(scope="module")
def result(student: QuantizedNetwork, pictures: np.ndarray) -> tuple[QuantizedNetwork, tuple]:
  return reconstruct_with_report(student, pictures, CONFIG, key=KEY)


def divergence(network: Network, student: QuantizedNetwork, images: np.ndarray) -> float:
  return float(_distance(network, student, images))


@jax.jit
def _distance(network: Network, student: QuantizedNetwork, images: jax.Array) -> jax.Array:
  return jnp.square(network.apply(images) - student.apply(images)).mean()


def test_every_unit_comes_closer_and_so_do_the_logits(
  residual: Network, student: QuantizedNetwork, pictures: np.ndarray, result: tuple
) -> None:
  found, reports = result
  assert [report.unit for report in reports] == [unit.name for unit in find_units(residual)]
  assert all(report.after < report.before for report in reports)
  assert all(0.0 < report.changed < 0.5 for report in reports)
  assert divergence(residual, found, pictures) < 0.8 * divergence(residual, student, pictures)
  others = np.random.default_rng(5).uniform(size=(32, 6, 6, 3)).astype(np.float32)
  assert divergence(residual, found, others) < 0.9 * divergence(residual, student, others)
  assert "conv1 to conv2" in describe(reports)


def test_the_error_before_is_that_of_the_calibrated_student(
  residual: Network, student: QuantizedNetwork, pictures: np.ndarray, result: tuple
) -> None:
  # The first unit, by hand: behind it is BatchNorm and ReLU.
  def first(network: Network | QuantizedNetwork) -> np.ndarray:
    kept = {}

    def keep(module: object, x: jax.Array, proceed: object) -> jax.Array:
      y = proceed(x)  # type: ignore[operator]
      kept["y"] = jax.nn.relu(y)
      return y

    from kwjax import intercept

    apply = intercept.intercept(network.forward, lambda m: intercept.layer_name(m) == "stem_bn", keep)
    apply(network.variables, jnp.asarray(pictures))
    return np.asarray(kept["y"])

  error = np.square(first(student) - first(residual)).sum(-1).mean()
  assert result[1][0].before == pytest.approx(error, rel=1e-4)
  after = np.square(first(result[0]) - first(residual)).sum(-1).mean()
  assert result[1][0].after == pytest.approx(after, rel=1e-4)


def test_weights_lie_on_the_exported_grid_within_a_level_of_the_float_ones(residual: Network, result: tuple) -> None:
  found = result[0]
  integers = kwjax.integer_weights(found)
  for name, tensor in integers.items():
    new, old = (np.asarray(_kernel(network, name)) for network in (found, residual))
    np.testing.assert_array_equal(tensor.dequantize(), new)
    lowest, highest = ((level - np.asarray(tensor.zero)) * np.asarray(tensor.scale) for level in (-128, 127))
    assert (np.abs(new - np.clip(old, lowest, highest)) <= 1.001 * np.asarray(tensor.scale)).mean() > 0.95


def _kernel(network: Network | QuantizedNetwork, name: str) -> jax.Array:
  value = network.variables["params"]
  for key in kernel_path(name):
    value = value[key]
  return value


def test_a_reconstructed_student_is_saved_exported_and_distilled_as_any_other(
  residual: Network, pictures: np.ndarray, result: tuple, tmp_path: pathlib.Path
) -> None:
  found = result[0]
  kwjax.save_quantized(found, tmp_path / "student")
  loaded = kwjax.load_quantized(tmp_path / "student", module=residual.module)
  np.testing.assert_array_equal(loaded.apply(pictures), found.apply(pictures))
  grids = tmp_path / "student" / "weight_grids.safetensors"
  grids.write_bytes(grids.read_bytes()[:-1])
  with pytest.raises(WeightsError, match=r"weight_grids\.safetensors is damaged"):
    kwjax.load_quantized(tmp_path / "student", module=residual.module)
  kwjax.export_onnx(found, tmp_path / "student.onnx")
  session = onnxruntime.InferenceSession(tmp_path / "student.onnx")
  (logits,) = session.run(None, {session.get_inputs()[0].name: pictures[:4]})
  np.testing.assert_allclose(logits, found.apply(pictures[:4]), atol=1e-3)
  # Its own weights are rounded, so means of theirs would be corrected towards the wrong network.
  with pytest.raises(KwjaxError, match="pass the float network as reference="):
    kwjax.correct_bias(found, pictures)
  corrected = kwjax.correct_bias(found, pictures, reference=residual)
  bias = lambda network: network.variables["params"]["classifier"]["bias"]
  drift = found.apply(pictures).mean(0) - residual.apply(pictures).mean(0)
  assert np.abs(corrected.apply(pictures).mean(0) - residual.apply(pictures).mean(0)).max() < 0.1 * np.abs(drift).max()
  assert np.abs(bias(corrected) - bias(found)).max() > 0
  config = kwjax.DistillConfig(steps=2, batch_size=8, iq_weight=0.0, learning_rate=1e-3)
  tuned = kwjax.distill(found, residual, pictures, config, key=KEY)
  assert np.isfinite(tuned.apply(pictures)).all()


def test_a_stopped_run_goes_on_behind_the_last_unit_and_ends_with_the_same_bits(
  student: QuantizedNetwork, pictures: np.ndarray, result: tuple, tmp_path: pathlib.Path
) -> None:
  calls = itertools.count()
  with pytest.raises(Interrupted, match="reconstruction of conv1 to conv2"):
    reconstruct(student, pictures, CONFIG, key=KEY, workdir=tmp_path, should_stop=lambda: next(calls) > 300)
  assert [path.name for path in (tmp_path / "reconstruction" / "checkpoints").iterdir()] == ["1"]
  found, reports = reconstruct_with_report(student, pictures, CONFIG, key=KEY, workdir=tmp_path)
  jax.tree.map(np.testing.assert_array_equal, found, result[0])
  assert [report.after for report in reports] == [report.after for report in result[1]]
  with pytest.raises(CheckpointError, match="iterations"):
    reconstruct(student, pictures, CONFIG.replace(iterations=61), key=KEY, workdir=tmp_path)


def test_features_on_the_host_and_in_files_give_the_same_student(
  student: QuantizedNetwork, pictures: np.ndarray, result: tuple, tmp_path: pathlib.Path
) -> None:
  config = CONFIG.replace(resident_bytes=0, host_bytes=0)
  found = reconstruct(student, pictures, config, key=KEY, workdir=tmp_path)
  jax.tree.map(np.testing.assert_array_equal, found, result[0])
  assert not list(tmp_path.glob("features-*"))


def test_two_devices_give_the_student_of_one(student: QuantizedNetwork, pictures: np.ndarray) -> None:
  # Without dropping: what is dropped differs from device to device.
  config = CONFIG.replace(iterations=6, keep=0.0)
  one, two = (
    reconstruct(student, pictures, config.replace(resident_bytes=held), key=KEY, devices=count)
    for held, count in ((0, 1), (1 << 30, 2))
  )
  for name in one.ranges:
    np.testing.assert_allclose(one.ranges[name].hi, two.ranges[name].hi, rtol=1e-4)
    levels = [np.asarray(kwjax.integer_weights(found)[name].q) for found in (one, two)]
    assert (levels[0] == levels[1]).mean() > 0.98


def test_scanned_and_rematerialised_modules_are_reconstructed() -> None:
  module, shape, evaluation = STYLES["lifted"]
  network = make_network(module, shape, evaluation)
  images = np.random.default_rng(0).uniform(size=(16, *shape)).astype(np.float32)
  student = student_of(network, images)
  found, reports = reconstruct_with_report(student, images, CONFIG.replace(iterations=100), key=KEY)
  assert sum(report.after for report in reports) < sum(report.before for report in reports)
  assert divergence(network, found, images) < divergence(network, student, images)


def test_mixed_bits_trained_weight_scales_and_channel_weights(residual: Network, pictures: np.ndarray) -> None:
  student = student_of(residual, pictures, "2w32a", overrides={"stem": "float", "classifier": "8w8a"})
  config = CONFIG.replace(scale_rate=1e-3, fisher=True)
  found, reports = reconstruct_with_report(student, pictures, config, key=KEY)
  np.testing.assert_array_equal(_kernel(found, "stem"), _kernel(residual, "stem"))
  assert sorted(found.grids) == ["classifier", "conv1", "conv2"]
  assert not np.array_equal(found.grids["conv1"].scale, kwjax.integer_weights(student)["conv1"].scale)
  assert reports[0].before == reports[0].after == pytest.approx(0.0, abs=1e-9)
  assert divergence(residual, found, pictures) < divergence(residual, student, pictures)


def test_channel_weights_of_logits_are_the_squared_gradient_of_the_divergence(
  residual: Network, student: QuantizedNetwork, pictures: np.ndarray
) -> None:
  from kwjax.reconstruction.fisher import channel_weights
  from kwjax.reconstruction.trace import given_variables
  from kwjax.reconstruction.units import Cut
  from kwjax.runtime.devices.parallel import device_group

  cut = Cut(residual, find_units(residual), {}, "float", dict(residual.variables), 8)
  shifted = residual.replace(variables=jax.tree.map(lambda leaf: 1.1 * leaf, dict(residual.variables)))
  variables = given_variables(shifted.variables, {})
  leaves = [part.leaves(variables) for part in cut.parts]
  found = channel_weights(cut.parts, leaves, residual, pictures, device_group(2), lambda: False)
  # The gradient of the cross-entropy by logits is the difference of the probabilities.
  difference = jax.nn.softmax(shifted.apply(pictures)) - jax.nn.softmax(residual.apply(pictures))
  expected = np.square(difference).mean(0)
  np.testing.assert_allclose(found[-1], expected / expected.mean(), rtol=1e-3)
  assert all(weights.mean() == pytest.approx(1.0, rel=1e-4) for weights in found)


def test_what_cannot_be_reconstructed_is_refused(residual: Network, pictures: np.ndarray) -> None:
  nothing = student_of(residual, pictures, "32w32a")
  with pytest.raises(KwjaxError, match="nothing is quantized"):
    reconstruct(nothing, pictures, CONFIG, key=KEY)
  with pytest.raises(KwjaxError, match="no images|at least one image"):
    reconstruct(student_of(residual, pictures), pictures[:0], CONFIG, key=KEY)
  with pytest.raises(KwjaxError, match="keep must be at least 0 and below 1, found 1"):
    ReconstructConfig(keep=1.0)
  with pytest.raises(KwjaxError, match="unknown preset 'slow'; known: fast, published"):
    ReconstructConfig.preset("slow")
  assert ReconstructConfig.preset("published").iterations == 20_000
