"""Networks as values: storage, validation, what a call does."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax import load_network, save_network
from kwjax.errors import KwjaxError, WeightsError
from kwjax.network import Network, check_shapes, fingerprint
from tests.networks import TinyNet, tiny_network

IMAGES = jax.random.uniform(jax.random.key(0), (3, 8, 8, 3))


def test_images_are_normalized_before_the_module() -> None:
  network = tiny_network()
  expected = network.module.apply(network.variables, (IMAGES - 0.45) / 0.25)
  np.testing.assert_allclose(network.apply(IMAGES), expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(jax.jit(lambda n, x: n.apply(x))(network, IMAGES), expected, rtol=1e-5, atol=1e-6)
  assert network.num_classes == 5


def test_one_structure_is_compiled_once() -> None:
  traces = []

  @jax.jit
  def call(network: Network, x: jax.Array) -> jax.Array:
    traces.append(1)
    return network.apply(x)

  network = tiny_network()
  call(network, IMAGES)
  call(network.replace(variables=jax.tree.map(lambda v: v + 1, network.variables)), IMAGES)
  assert len(traces) == 1


def test_saved_and_loaded_it_is_the_same(tmp_path: pathlib.Path) -> None:
  network = tiny_network().replace(source={"file": "x.pth"})
  save_network(network, tmp_path / "net")
  loaded = load_network(tmp_path / "net", module=TinyNet())
  np.testing.assert_array_equal(loaded.apply(IMAGES), network.apply(IMAGES))
  assert (loaded.image_shape, loaded.input_mean, loaded.input_std) == ((8, 8, 3), (0.45,) * 3, (0.25,) * 3)
  assert loaded.source == {"file": "x.pth"}
  assert fingerprint(loaded) == fingerprint(network)


def test_fingerprint_tells_networks_apart() -> None:
  network = tiny_network()
  assert fingerprint(network) != fingerprint(network.replace(input_mean=(0.4,) * 3))
  variables = jax.tree.map(lambda leaf: leaf, network.variables)
  variables["params"]["fc"]["bias"] = variables["params"]["fc"]["bias"].at[0].add(1e-6)
  assert fingerprint(network) != fingerprint(network.replace(variables=variables))


def with_leaf(network: Network, collection: str, layer: str, name: str, value: jax.Array) -> Network:
  variables = jax.tree.map(lambda leaf: leaf, network.variables)
  variables[collection][layer][name] = value
  return network.replace(variables=variables)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (("params", "fc", "bias", jnp.full(5, jnp.nan)), r"params/fc/bias \(5 of 5"),
    (("params", "conv0", "kernel", jnp.full((3, 3, 3, 8), jnp.inf)), "params/conv0/kernel"),
    (("batch_stats", "bn1", "var", jnp.full(16, -1.0)), r"batch_stats/bn1/var \(16 negative"),
    (("params", "fc", "bias", jnp.zeros(6)), r"params/fc/bias expected \(5,\) found \(6,\)"),
    (("params", "fc", "extra", jnp.zeros(2)), r"unexpected params/fc/extra \(2,\)"),
  ],
)
def test_unusable_weights_are_named(tmp_path: pathlib.Path, change: tuple, message: str) -> None:
  save_network(with_leaf(tiny_network(), *change), tmp_path)
  with pytest.raises(WeightsError, match=message):
    load_network(tmp_path, module=TinyNet())


def test_damaged_and_missing_files_are_named(tmp_path: pathlib.Path) -> None:
  with pytest.raises(WeightsError, match=r"not a kwjax network: it has no network\.json"):
    load_network(tmp_path / "nowhere")
  save_network(tiny_network(), tmp_path)
  with pytest.raises(WeightsError, match="names no architecture"):
    load_network(tmp_path)
  weights = tmp_path / "model.safetensors"
  data = bytearray(weights.read_bytes())
  data[-1] ^= 1
  weights.write_bytes(data)
  with pytest.raises(WeightsError, match=r"model\.safetensors is damaged"):
    load_network(tmp_path, module=TinyNet())
  weights.unlink()
  with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read"):
    load_network(tmp_path, module=TinyNet())
  (tmp_path / "network.json").write_text("{")
  with pytest.raises(WeightsError, match=r"network\.json cannot be read"):
    load_network(tmp_path)
  (tmp_path / "network.json").write_text(json.dumps({"format": 99}))
  with pytest.raises(WeightsError, match="format 99"):
    load_network(tmp_path)


def test_unknown_architecture_lists_the_known_ones(tmp_path: pathlib.Path) -> None:
  save_network(tiny_network().replace(arch="resnet21"), tmp_path)
  with pytest.raises(KwjaxError, match="resnet20"):
    load_network(tmp_path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"image_shape": (8, 8)}, "image_shape"),
    ({"input_mean": (0.5,)}, "one value for each of 3 channels"),
    ({"input_std": (0.2, 0.0, 0.2)}, "input_std positive"),
  ],
)
def test_impossible_descriptions_are_refused(changes: dict, message: str) -> None:
  with pytest.raises(KwjaxError, match=message):
    tiny_network().replace(**changes)


def test_module_that_returns_no_logits_is_named() -> None:
  class Features(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
      return nn.Conv(2, (1, 1))(x)

  variables = Features().init(jax.random.key(0), IMAGES)
  network = Network(
    Features(), variables, image_shape=(8, 8, 3), input_mean=[0] * 3, input_std=[1] * 3, name="features"
  )
  with pytest.raises(KwjaxError, match=r"features must return logits .* shape \(1, 8, 8, 2\)"):
    network.apply(IMAGES)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"colour": 1}, r"unknown keys \['colour'\]"),
    ({"input_std": None}, "does not describe a network"),
    ({"image_shape": [8, 8, 10**30]}, "3 channels|cannot be built|one value for each"),
    ({"model_options": {"blocks_per_stage": 10**6}}, "blocks_per_stage must be at most 1000, found 1000000"),
    ({"model_options": {"num_classes": 2.5}}, "num_classes must be a whole number"),
    ({"model_options": {"name": "x"}}, "model_options"),
    ({"model_options": {"blocks_per_stage": "many"}}, "cannot be built"),
    ({"call_options": {"rngs": 1}}, "cannot be built"),
    ({"weights_sha256": 7}, r"model\.safetensors is damaged: expected sha256 7"),
    ({"arch": ["resnet20"]}, "arch must be a name"),
  ],
)
def test_descriptions_that_fit_no_network_are_refused(tmp_path: pathlib.Path, changes: dict, message: str) -> None:
  save_network(tiny_network().replace(arch="resnet20", model_options={"num_classes": 10}), tmp_path)
  path = tmp_path / "network.json"
  description = json.loads(path.read_text())
  del description["sha256"]
  path.write_text(json.dumps({**description, **changes}))
  with pytest.raises(WeightsError, match=message):
    load_network(tmp_path)


def test_a_description_may_be_written_by_hand_but_not_edited(tmp_path: pathlib.Path) -> None:
  save_network(tiny_network(), tmp_path)
  path = tmp_path / "network.json"
  edited = path.read_text().replace("0.45", "0.46", 1)
  path.write_text(edited)
  with pytest.raises(WeightsError, match="damaged or was edited"):
    load_network(tmp_path, module=TinyNet())
  description = json.loads(edited)
  del description["sha256"]
  path.write_text(json.dumps(description))
  assert load_network(tmp_path, module=TinyNet()).input_mean == (0.46, 0.45, 0.45)
  path.write_text("[" * 100_000)
  with pytest.raises(WeightsError, match="not valid JSON"):
    load_network(tmp_path, module=TinyNet())


def test_a_message_names_some_arrays_and_counts_the_others() -> None:
  expected = {"params": {f"layer{i}": {"kernel": np.zeros((3, 4))} for i in range(500)}}
  found = {"params": {"layer0": {"kernel": np.zeros((3, 5))}}}
  with pytest.raises(
    WeightsError, match=r"params/layer0/kernel expected \(3, 4\) found \(3, 5\); missing .*; and 480 more"
  ) as error:
    check_shapes(expected, found, "some.pth")
  assert len(str(error.value)) < 2000
