"""The forms for 32x32 images: sizes of the stages, and logits equal to torchvision's networks with the stem exchanged."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.torch_networks import import_torchvision
from kwjax.models import DenseNet, get_model, model_info, registry
from weights_conversion import to_flax

SMALL = ("resnet18_cifar", "resnet34_cifar", "mobilenet_v2_cifar", "densenet121_cifar", "densenet169_cifar")


def pixels(name: str) -> dict[str, tuple[int, int]]:
  """Height and channels of what each module directly under the top one returns, for one image of the network's size."""
  found: dict[str, tuple[int, int]] = {}

  def note(run: Any, arguments: Any, keywords: Any, context: Any) -> Any:
    y = run(*arguments, **keywords)
    if context.method_name == "__call__" and len(context.module.path) == 1 and y.ndim == 4:
      assert y.shape[1] == y.shape[2]
      found[context.module.path[0]] = (y.shape[1], y.shape[3])
    return y

  module = get_model(name)
  with nn.intercept_methods(note):
    image = jax.ShapeDtypeStruct((1, *model_info(name).image_shape), jnp.float32)
    jax.eval_shape(module.init, jax.random.key(0), image)
  return found


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("resnet18_cifar", {"conv1": (32, 64), "layer1_1": (32, 64), "layer2_1": (16, 128), "layer4_1": (4, 512)}),
    ("resnet34_cifar", {"conv1": (32, 64), "layer1_2": (32, 64), "layer3_5": (8, 256), "layer4_2": (4, 512)}),
    (
      "mobilenet_v2_cifar",
      {"features_0_0": (32, 32), "features_3": (32, 24), "features_6": (16, 32), "features_18_0": (4, 1280)},
    ),
    (
      "densenet121_cifar",
      {"conv0": (32, 64), "denseblock1": (32, 256), "transition1": (16, 128), "denseblock4": (4, 1024)},
    ),
    ("wrn16_8", {"conv1": (32, 16), "block1_layer_1": (32, 128), "block2_layer_1": (16, 256), "bn1": (8, 512)}),
    ("wrn28_10", {"conv1": (32, 16), "block1_layer_3": (32, 160), "block2_layer_3": (16, 320), "bn1": (8, 640)}),
  ],
)
def test_stages_have_the_pixels_and_channels_of_the_published_forms(
  name: str, expected: dict[str, tuple[int, int]]
) -> None:
  found = pixels(name)
  assert {layer: found[layer] for layer in expected} == expected


def test_information_is_cifar_10s() -> None:
  for name in SMALL:
    info = model_info(name)
    assert (info.image_shape, info.num_classes) == ((32, 32, 3), 10)
    assert info.family == model_info(name.removesuffix("_cifar")).family
    assert info.input_mean == (0.4914, 0.4822, 0.4465)


def test_the_reference_lists_every_network() -> None:
  page = pathlib.Path(__file__).parents[2] / "docs" / "api" / "networks.md"
  assert set(registry._BUILT_IN) == set(re.findall(r"`(\w+)`(?=[,| ])", page.read_text())) - {
    "shortcut",
    "linear",
    "norm0",
  }


def torch_form(name: str) -> Any:
  """torchvision's network for 32x32 images, with random weights and statistics, in evaluation mode."""
  import torch

  models = import_torchvision().models
  if name == "resnet18_cifar":
    network = models.resnet18(num_classes=10)
    network.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool = torch.nn.Identity()
  elif name == "mobilenet_v2_cifar":
    network = models.mobilenet_v2(num_classes=10)
    network.features[0][0].stride = network.features[2].conv[1][0].stride = (1, 1)
  else:
    network = models.DenseNet(growth_rate=8, block_config=(2, 2, 2, 2), num_init_features=16, num_classes=10)
    network.features.conv0 = torch.nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    for layer in ("norm0", "relu0", "pool0"):
      delattr(network.features, layer)
  generator = torch.Generator().manual_seed(0)
  for module in network.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      for values in (module.running_var, module.weight.data):
        values.uniform_(0.5, 1.5, generator=generator)
      for values in (module.running_mean, module.bias.data):
        values.normal_(0.0, 0.2, generator=generator)
  return network.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18_cifar", "mobilenet_v2_cifar", "densenet_small"])
def test_converted_weights_answer_as_in_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
  torch = pytest.importorskip("torch")
  if importlib.util.find_spec("torchvision") is None:  # importing it here would fail, see import_torchvision
    pytest.skip("needs torchvision")

  def small(num_classes: int) -> DenseNet:
    return DenseNet((2, 2, 2, 2), growth=8, num_classes=num_classes, small_images=True)

  # Of DenseNet a smaller one: all sizes are the same code, and 121 layers take long to compile.
  info = dataclasses.replace(model_info("densenet121_cifar"), name="densenet_small")
  monkeypatch.setitem(registry._TABLE, "densenet_small", (info, small))
  torch.manual_seed(0)
  original = torch_form(name)
  variables = to_flax(name, {key: value.numpy() for key, value in original.state_dict().items()})
  x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  with torch.no_grad():
    expected = original(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
  found = np.asarray(jax.jit(get_model(name).apply)(variables, x))
  assert expected.std() > 0.01
  np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_names_of_the_usual_cifar_resnets_are_understood() -> None:
  shapes = jax.eval_shape(get_model("resnet18_cifar").init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  assert shapes["params"]["layer2_0"]["downsample_0"]["kernel"].shape == (1, 1, 64, 128)
  state = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
    *modules, last = (entry.key for entry in path[1:])
    name = ".".join(modules).replace("_", ".").replace("downsample", "shortcut").replace("fc", "linear")
    ending = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}.get(last, last)
    rank = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(leaf.shape), (0,))
    state[f"{name}.{ending}"] = np.ones([leaf.shape[axis] for axis in rank], np.float32)
  assert "layer2.0.shortcut.0.weight" in state and "linear.bias" in state
  variables = to_flax("resnet18_cifar", state)
  assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, dict(shapes))
