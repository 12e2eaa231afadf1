"""Every network of the registry against published counts, its layer names and its modes."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from kwjax.errors import KwjaxError
from kwjax.models import get_model, known_models, model_info

# name: (parameters, BatchNorm layers). ImageNet: the counts that torchvision and the TensorFlow repository publish.
_COUNTS = {
  "resnet20": (269_722, 19),
  "resnet32": (464_154, 31),
  "resnet44": (658_586, 43),
  "resnet56": (853_018, 55),
  "resnet110": (1_727_962, 109),
  "resnet18": (11_689_512, 20),
  "resnet34": (21_797_672, 36),
  "resnet50": (25_557_032, 53),
  "resnet101": (44_549_160, 104),
  "mobilenet_v2": (3_504_872, 52),
  "densenet121": (7_978_856, 121),
  "densenet169": (14_149_480, 169),
  "efficientnet_lite0": (4_652_008, 49),
  # As the public PyTorch code for CIFAR-10 counts them, with ten classes.
  "resnet18_cifar": (11_173_962, 20),
  "resnet34_cifar": (21_282_122, 36),
  "mobilenet_v2_cifar": (2_236_682, 52),
  "densenet121_cifar": (6_956_298, 120),
  "densenet169_cifar": (12_493_322, 168),
}


def _wide_resnet_counts(depth, width, num_classes=100):
  """Parameters and BatchNorm layers in closed form, block by block."""
  blocks, channels, parameters, norms = (depth - 4) // 6, 16, 3 * 9 * 16, 1
  for stage in range(3):
    features = 16 * 2**stage * width
    for _ in range(blocks):
      parameters += 2 * channels + 9 * channels * features + 2 * features + 9 * features**2
      parameters += channels * features if channels != features else 0
      norms += 2
      channels = features
  return parameters + 2 * channels + (channels + 1) * num_classes, norms


# Tracing a deep network takes seconds.
@functools.cache
def _traced(name):
  """Variables, and what each BatchNorm layer is called with: (epsilon, momentum, whether it uses running statistics)."""
  seen = set()

  def record(next_function, arguments, keywords, context):
    if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
      seen.add((context.module.epsilon, context.module.momentum, context.module.use_running_average))
    return next_function(*arguments, **keywords)

  with nn.intercept_methods(record):
    variables = jax.eval_shape(get_model(name).init, jax.random.key(0), _images(name))
  return variables, seen


def _images(name):
  return jax.ShapeDtypeStruct((2, *model_info(name).image_shape), jnp.float32)


def _shapes(name):
  return _traced(name)[0]


def _count(variables):
  parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
  return parameters, sum(path[-1] == "mean" for path in flatten_dict(variables["batch_stats"]))


@pytest.mark.parametrize("name", sorted(_COUNTS))
def test_published_counts(name):
  assert _count(_shapes(name)) == _COUNTS[name]


@pytest.mark.parametrize(("depth", "width"), [(28, 10), (40, 2), (40, 1), (16, 1), (16, 2), (16, 8)])
def test_wide_resnet_counts(depth, width):
  assert _count(_shapes(f"wrn{depth}_{width}")) == _wide_resnet_counts(depth, width)


def test_wide_resnet_28_10_has_the_published_36_5_million_parameters():
  assert _wide_resnet_counts(28, 10)[0] == 36_536_884


def test_every_name_is_counted():
  wide = {name for name in known_models() if name.startswith("wrn")}
  assert set(known_models()) == set(_COUNTS) | wide
  assert len(wide) == 6


# The others are deeper or wider ones of these.
_KINDS = (
  *("resnet20", "resnet18", "resnet50", "mobilenet_v2", "densenet121", "efficientnet_lite0", "wrn16_1", "wrn16_2"),
  *("resnet18_cifar", "mobilenet_v2_cifar", "densenet121_cifar"),
)


def test_kinds_are_of_every_family():
  assert {model_info(name).family for name in _KINDS} == {model_info(name).family for name in known_models()}


@pytest.mark.parametrize("name", _KINDS)
def test_logits_are_float32_in_both_modes_and_classes_can_be_changed(name):
  module, images = get_model(name, num_classes=7), _images(name)
  logits, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
  assert logits.shape == (2, 7)
  assert logits.dtype == jnp.float32
  trained = jax.eval_shape(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]), variables, images)
  assert trained[0].shape == (2, 7)
  assert jax.tree.structure(trained[1]["batch_stats"]) == jax.tree.structure(variables["batch_stats"])


# The names are what converted weights are filed under.
@pytest.mark.parametrize(
  ("name", "paths"),
  [
    ("resnet20", ["conv1", "bn1", "layer1_0/conv1", "layer3_2/bn2", "linear"]),
    ("resnet18", ["conv1", "layer2_0/downsample_0", "layer2_0/downsample_1", "layer4_1/bn2", "fc"]),
    ("resnet50", ["layer1_0/downsample_1", "layer3_5/conv3", "layer3_5/bn3"]),
    (
      "mobilenet_v2",
      [
        "features_0_0",
        "features_0_1",
        "features_1/conv_0_0",
        "features_1/conv_1",
        "features_1/conv_2",
        "features_17/conv_1_0",
        "features_17/conv_3",
        "features_18_0",
        "features_18_1",
        "classifier_1",
      ],
    ),
    (
      "densenet121",
      [
        "conv0",
        "norm0",
        "denseblock1/denselayer1/norm1",
        "denseblock4/denselayer16/conv2",
        "transition3/norm",
        "transition3/conv",
        "norm5",
        "classifier",
      ],
    ),
    (
      "efficientnet_lite0",
      [
        "conv_stem",
        "bn0",
        "blocks_0/depthwise_conv",
        "blocks_0/bn1",
        "blocks_15/project_conv",
        "conv_head",
        "bn1",
        "fc",
      ],
    ),
    ("wrn16_2", ["conv1", "block1_layer_0/bn1", "block1_layer_0/convShortcut", "block3_layer_1/conv2", "bn1", "fc"]),
  ],
)
def test_layer_names(name, paths):
  variables = _shapes(name)
  layers = {"/".join(path[:-1]) for path in flatten_dict(variables["params"])}
  assert set(paths) <= layers


def test_first_wide_block_without_widening_has_no_projection():
  assert "convShortcut" not in _shapes("wrn16_1")["params"]["block1_layer_0"]


@pytest.mark.parametrize("name", known_models())
def test_batch_norm_constants_are_those_of_the_original(name):
  info = model_info(name)
  assert _traced(name)[1] == {(info.batch_norm_eps, info.batch_norm_momentum, True)}


@pytest.mark.parametrize("name", ["resnet20", "wrn16_1"])
def test_training_mode_moves_the_running_statistics_and_evaluation_does_not(name):
  module = get_model(name)
  images = 3.0 + jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
  variables = jax.jit(module.init)(jax.random.key(0), images)
  apply = jax.jit(lambda v, x, train: module.apply(v, x, train=train, mutable=["batch_stats"]), static_argnums=2)
  evaluated, trained = apply(variables, images, False)[1], apply(variables, images, True)[1]
  jax.tree.map(np.testing.assert_array_equal, evaluated["batch_stats"], variables["batch_stats"])
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), trained["batch_stats"], variables["batch_stats"])
  assert all(jax.tree.leaves(moved))


def test_option_a_shortcut_keeps_every_second_pixel_between_zero_channels():
  module = get_model("resnet20")
  images = jax.random.normal(jax.random.key(1), (1, 8, 8, 3))
  variables = module.init(jax.random.key(0), images)
  # With the residual branch of layer2_0 switched off by its last BatchNorm, the block returns its shortcut.
  variables["params"]["layer2_0"]["bn2"]["scale"] = jnp.zeros(32)
  _, state = module.apply(variables, images, capture_intermediates=True)
  captured = state["intermediates"]
  before, after = captured["layer1_2"]["__call__"][0], captured["layer2_0"]["__call__"][0]
  np.testing.assert_array_equal(after[..., 8:24], before[:, ::2, ::2, :])
  assert not np.any(after[..., :8])
  assert not np.any(after[..., 24:])


def test_dropout_is_an_option_that_changes_no_parameter():
  module, images = get_model("mobilenet_v2", dropout_rate=0.2), _images("mobilenet_v2")
  variables = jax.eval_shape(module.init, jax.random.key(0), images)
  assert jax.tree.structure(variables) == jax.tree.structure(_shapes("mobilenet_v2"))
  keywords = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(0)}}
  logits, _ = jax.eval_shape(lambda v, x: module.apply(v, x, **keywords), variables, images)
  assert logits.shape == (2, 1000)


@pytest.mark.parametrize("name", ["MobileNet-V2", "WRN28-10", "EfficientNet-Lite0", " resnet44 "])
def test_case_and_dashes_do_not_matter(name):
  assert model_info(name).name == name.strip().lower().replace("-", "_")
  assert isinstance(get_model(name), nn.Module)


def test_an_unknown_name_lists_the_known_ones():
  for function in (get_model, model_info):
    with pytest.raises(KwjaxError) as error:
      function("resnet21")
    assert "'resnet21'" in str(error.value)
    assert all(name in str(error.value) for name in known_models())


def test_an_unknown_option_and_an_impossible_number_of_classes_are_refused():
  with pytest.raises(KwjaxError, match=r"mobilenet_v2: unknown option width; .*dropout_rate"):
    get_model("mobilenet_v2", width=2)
  with pytest.raises(KwjaxError, match="at least 1, found 0"):
    get_model("resnet20", num_classes=0)


def test_information_on_inputs():
  assert model_info("resnet44").image_shape == (32, 32, 3)
  assert model_info("resnet44").input_mean == (0.485, 0.456, 0.406)
  assert model_info("wrn40_2").num_classes == 100
  lite = model_info("efficientnet_lite0")
  # Its weights were trained on (x - 127) / 128 with x in 0..255.
  pixel = (np.array([0.0, 255.0]) / 255 - lite.input_mean[0]) / lite.input_std[0]
  np.testing.assert_allclose(pixel, [-127 / 128, 1.0])
