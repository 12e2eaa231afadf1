"""Stage outputs: which ones are chosen, and that the recorded values are the modules' own outputs."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.distillation import recorded_features, recording_features, resolve_stages, stage_outputs
from kwjax.errors import KwjaxError
from kwjax.models import get_model, model_info
from kwjax.network import Network


def test_default_stages_are_the_last_blocks_of_each_size(teacher: Network) -> None:
  assert stage_outputs(teacher) == ("block1", "block3")


def test_recorded_features_are_the_modules_outputs(teacher: Network, images: np.ndarray) -> None:
  @jax.jit
  def run(x: jax.Array) -> dict[str, jax.Array]:
    return recorded_features(recording_features(teacher.forward, ("block1", "block3"))(teacher.variables, x)[1])

  x = (images[:4] - np.asarray(teacher.input_mean)) / np.asarray(teacher.input_std)
  _, state = teacher.module.apply(teacher.variables, jnp.asarray(x, jnp.float32), capture_intermediates=True)
  found = run(jnp.asarray(images[:4]))
  assert set(found) == {"block1", "block3"}
  for name, value in found.items():
    np.testing.assert_allclose(value, state["intermediates"][name]["__call__"][0], rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_recorded_features(teacher: Network, images: np.ndarray) -> None:
  def loss(params: Any) -> jax.Array:
    apply = recording_features(teacher.forward, ("block1",))
    features = recorded_features(apply({**teacher.variables, "params": params}, jnp.asarray(images[:2]))[1])
    return jnp.sum(jnp.square(features["block1"]))

  gradient = jax.grad(loss)(teacher.variables["params"])
  assert float(jnp.abs(gradient["stem"]["kernel"]).max()) > 0
  # What comes after the stage has no part in it.
  assert float(jnp.abs(gradient["head"]["kernel"]).max()) == 0.0
  assert float(jnp.abs(gradient["block3"]["Conv_0"]["kernel"]).max()) == 0.0


def test_remat_and_repeated_calls(tools: Any) -> None:
  class Repeated(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
      x = nn.Conv(8, (1, 1), name="stem")(x)
      block = nn.remat(tools.block, static_argnums=(2,))(8, name="block")
      return nn.Dense(5)(block(block(x, train), train).mean((1, 2)))

  network = tools.network(Repeated())
  x = jax.random.uniform(jax.random.key(0), (2, *tools.shape))
  _, mutated = recording_features(network.forward, ("block",))(network.variables, x)
  standard = (x - jnp.asarray(network.input_mean)) / jnp.asarray(network.input_std)
  _, state = network.module.apply(network.variables, standard, capture_intermediates=True)
  outputs = state["intermediates"]["block"]["__call__"]
  np.testing.assert_allclose(recorded_features(mutated)["block"], outputs[-1], rtol=1e-5, atol=1e-5)
  assert not np.allclose(outputs[0], outputs[-1])


def test_a_network_without_composite_modules_has_no_stages(tools: Any) -> None:
  class Plain(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
      x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3), name="conv")(x))
      return nn.Dense(3)(x.mean((1, 2)))

  network = tools.network(Plain())
  assert stage_outputs(network) == ()
  assert resolve_stages(network, network, None) == ()
  # A layer of Flax itself is not a default, but may be asked for.
  assert resolve_stages(network, network, ("conv",)) == ("conv",)
  with pytest.raises(KwjaxError, match=r"has no module 'layer1' that returns a feature map .*: conv, BatchNorm_0"):
    resolve_stages(network, network, ("layer1",))


def test_unknown_stage_lists_candidates(teacher: Network, student: Network) -> None:
  with pytest.raises(KwjaxError, match=r"student has no module 'block9' .* candidates: block1, block3"):
    resolve_stages(student, teacher, ("block1", "block9"))


def test_only_stages_of_equal_shape_are_compared_by_default(teacher: Network, tools: Any) -> None:
  class Wider(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
      x = tools.block(8, name="block1")(x, train=train)
      x = tools.block(16, 2, name="block3")(x, train=train)
      return nn.Dense(5)(x.mean((1, 2)))

  wider = tools.network(Wider(), name="wider")
  assert resolve_stages(wider, teacher, None) == ("block1",)
  with pytest.raises(KwjaxError, match=r"stage block3 has shape \(1, 4, 4, 8\) in teacher teacher and \(1, 4, 4, 16\)"):
    resolve_stages(wider, teacher, ("block3",))


@pytest.mark.parametrize(
  ("arch", "stages"),
  [
    ("resnet44", ("layer1_6", "layer2_6", "layer3_6")),
    ("wrn16_1", ("block1_layer_1", "block2_layer_1", "block3_layer_1")),
    ("resnet18", ("layer1_1", "layer2_1", "layer3_1", "layer4_1")),
    ("mobilenet_v2", ("features_1", "features_3", "features_6", "features_13", "features_17")),
    ("densenet121", ("denseblock1", "denseblock2", "denseblock3", "denseblock4")),
    ("efficientnet_lite0", ("blocks_0", "blocks_2", "blocks_4", "blocks_10", "blocks_15")),
  ],
)
def test_stages_of_the_known_models(arch: str, stages: tuple[str, ...]) -> None:
  """Only shapes are traced: no weights are made and nothing is computed."""
  module, info = get_model(arch), model_info(arch)
  image = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
  variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), image)
  network = Network(
    module, variables, image_shape=info.image_shape, input_mean=info.input_mean, input_std=info.input_std
  )
  assert stage_outputs(network) == stages
