"""StableHLO and safetensors files are the quantized network; damage is found."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from kwjax.errors import KwjaxError, RuleError, WeightsError
from kwjax.export import export_safetensors, export_stablehlo, load_safetensors, load_stablehlo
from kwjax.export.tensors import run_integer
from kwjax.models import CifarResNet
from tests.export.networks import logits


@pytest.fixture(scope="module")
def networks(make, make_quantized, images):
  network = make(CifarResNet(1))
  student = make_quantized(network, "4w4a", "sym")
  return network, student, logits(network, images), logits(student, images)


@pytest.fixture(scope="module")
def program(networks, tmp_path_factory):
  path = tmp_path_factory.mktemp("stablehlo") / "net.stablehlo"
  return path, export_stablehlo(networks[1], path)


def far_less(found, simulated, float_logits):
  return np.median(np.abs(found - simulated)) < 0.05 * np.median(np.abs(float_logits - simulated))


def test_program_is_the_quantized_network_on_every_platform(networks, program, images):
  path, facts = program
  _, student, float_logits, simulated = networks
  assert facts.platforms == ("cpu", "cuda", "tpu") and facts.float_layers == ()
  assert set(facts.integer_layers) == set(student.ranges)
  loaded = load_stablehlo(path)
  assert loaded.image_shape == (8, 8, 3)
  assert far_less(np.asarray(loaded(images)), simulated, float_logits)
  # Another number of images, under a transformation.
  np.testing.assert_allclose(jax.jit(loaded.call)(images[:5]).shape, (5, 10))
  # Roundings, int8 kernels, and a program that JAX reads by itself.
  text = loaded.text()
  assert "round_nearest_even" in text and text.count("xi8>") >= len(facts.integer_layers)
  assert jax.export.deserialize(bytearray(path.read_bytes())).platforms == ("cpu", "cuda", "tpu")


def test_float_program(networks, images, tmp_path):
  network, _, float_logits, _ = networks
  facts = export_stablehlo(network, tmp_path / "net.stablehlo", platforms=["cpu"], batch=24)
  assert facts.integer_layers == ()
  np.testing.assert_allclose(load_stablehlo(tmp_path / "net.stablehlo")(images), float_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damage", ["flip", "cut", "other"])
def test_damaged_programs_are_refused(program, damage, tmp_path):
  payload = bytearray(program[0].read_bytes())
  if damage == "flip":
    payload[len(payload) // 2] ^= 1
  bad = tmp_path / "net.stablehlo"
  bad.write_bytes({"flip": payload, "cut": payload[:-9], "other": b"text"}[damage])
  with pytest.raises(WeightsError, match="net.stablehlo is"):
    load_stablehlo(bad)


def test_an_unknown_platform_is_named(networks, tmp_path):
  with pytest.raises(KwjaxError, match="platforms must be some of cpu, cuda, rocm, tpu, found abacus"):
    export_stablehlo(networks[0], tmp_path / "net.stablehlo", platforms=["abacus"])


def test_safetensors_hold_the_whole_network(networks, images, tmp_path):
  network, student, _, simulated = networks
  written = export_safetensors(student, tmp_path / "net.safetensors")
  stored = load_safetensors(tmp_path / "net.safetensors")
  assert set(stored.weights) == set(stored.inputs) == set(written.weights) == set(student.ranges)
  assert all(tensor.q.dtype == np.int8 for tensor in stored.weights.values())
  assert not any("kernel" in name for name in stored.floats)
  found = np.asarray(jax.jit(lambda x: run_integer(stored, network, x))(images))
  assert np.median(np.abs(found - simulated)) < 1e-5


def test_safetensors_are_refused_where_something_is_missing(make, make_quantized, images, networks, tmp_path):
  with pytest.raises(RuleError, match="layer .* has no integer weights"):
    export_safetensors(make_quantized(networks[0], "4w4a", "affine"), tmp_path / "net.safetensors")
  (tmp_path / "bad.safetensors").write_bytes(b"text")
  with pytest.raises(WeightsError, match=r"bad\.safetensors is not a safetensors file"):
    load_safetensors(tmp_path / "bad.safetensors")
