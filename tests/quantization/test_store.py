"""A saved quantized network gives the same logits, and a damaged folder is refused."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest

from kwjax.errors import WeightsError
from kwjax.quantization import (
  QuantRules,
  calibrate,
  integer_weights,
  load_integer_weights,
  load_quantized,
  quantize,
  save_quantized,
)


def student(network, images, **options):
  rules = QuantRules.parse("4w4a", first_last="8w8a", **options)
  return quantize(network, rules, calibrate(network, images, rules, key=jax.random.key(0), steps=1, batch_size=16))


def test_round_trip(network, images, tmp_path):
  saved = student(network, images, weights="symfull", overrides={"depthwise": "float"})
  save_quantized(saved, tmp_path / "new" / "folder")
  loaded = load_quantized(tmp_path / "new" / "folder", module=network.module)
  assert loaded.rules == saved.rules
  np.testing.assert_array_equal(loaded.apply(images), saved.apply(images))
  integers = load_integer_weights(tmp_path / "new" / "folder")
  expected = integer_weights(saved)
  assert sorted(integers) == sorted(expected) == ["classifier", "pointwise", "stem"]
  jax.tree.map(np.testing.assert_array_equal, integers, expected)


def test_round_trip_under_scan(stacked_networks, tmp_path):
  network = stacked_networks["scan"]
  images = jax.random.uniform(jax.random.key(2), (4, 6, 6, 6))
  saved = student(network, images, weights="affine0")
  save_quantized(saved, tmp_path)
  np.testing.assert_array_equal(load_quantized(tmp_path, module=network.module).apply(images), saved.apply(images))


def test_schemes_without_integers_leave_no_integer_file(network, images, tmp_path):
  save_quantized(student(network, images, weights="sym"), tmp_path)
  assert (tmp_path / "integer.safetensors").exists()
  save_quantized(student(network, images), tmp_path)
  assert not (tmp_path / "integer.safetensors").exists()
  load_quantized(tmp_path, module=network.module)
  with pytest.raises(WeightsError, match="no integer weights"):
    load_integer_weights(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "integer.safetensors", "quantization.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found(network, images, tmp_path, file, damage):
  save_quantized(student(network, images, weights="sym"), tmp_path)
  path = tmp_path / file
  payload = bytearray(path.read_bytes())
  if damage == "remove":
    path.unlink()
  elif damage == "cut":
    path.write_bytes(payload[: len(payload) // 2])
  elif file == "quantization.json":
    text = path.read_text()
    bits = json.loads(text)["rules"]["bits"]
    path.write_text(text.replace(f'"bits": "{bits}"', '"bits": "5w4a"'))
  else:
    payload[-3] ^= 1
    path.write_bytes(payload)
  with pytest.raises(WeightsError, match=re.escape(file)):
    load_quantized(tmp_path, module=network.module)


def test_weights_of_another_network_are_refused(network, make_network, images, tmp_path):
  from kwjax.network import save_network

  save_quantized(student(network, images), tmp_path)
  save_network(make_network(network.module, network.image_shape, seed=5), tmp_path)
  with pytest.raises(WeightsError, match=r"model\.safetensors is damaged or of another network"):
    load_quantized(tmp_path, module=network.module)
