from __future__ import annotations

import types

import numpy as np
import pytest
from checkpoint_files import save_state_dict
from reference_networks import seeded_state_dict

from benchmarks.torch_networks import import_torchvision
from kwjax.errors import KwjaxError, WeightsError
from kwjax.models import known_models, model_info
from weights_conversion import convert, embedded_checkpoint, load_torch_state_dict, to_flax
from weights_conversion.mapping import LEAVES, flax_entries, make_plan
from weights_conversion.naming import dotted, namings
from weights_conversion.verify import natural_order


def source_shapes(arch: str, naming: str) -> dict[str, tuple[int, ...]]:
  entries = flax_entries(arch)
  rule = namings(arch, [entry.module for entry in entries])[naming]
  return {f"{rule(entry.module)}.{LEAVES[entry.path[0], entry.path[-1]]}": entry.torch_shape for entry in entries}


@pytest.fixture(scope="module")
def resnet20():
  return seeded_state_dict(source_shapes("resnet20", "original"))


@pytest.mark.parametrize(
  ("path", "name"),
  [
    (("layer1_0", "conv1"), "layer1.0.conv1"),
    (("layer1_0", "downsample_0"), "layer1.0.downsample.0"),
    (("features_1", "conv_0_0"), "features.1.conv.0.0"),
    (("features_0_1",), "features.0.1"),
    (("classifier_1",), "classifier.1"),
    (("block1_layer_0", "convShortcut"), "block1.layer.0.convShortcut"),
    (("conv_stem",), "conv_stem"),
    (("denseblock1", "denselayer12", "norm1"), "denseblock1.denselayer12.norm1"),
  ],
)
def test_flax_paths_read_as_torch_names(path, name):
  assert dotted(path) == name


@pytest.mark.parametrize("arch", known_models())
def test_every_array_of_every_network_has_its_own_source_name(arch):
  for naming in namings(arch, [entry.module for entry in flax_entries(arch)]):
    assert len(source_shapes(arch, naming)) == len(flax_entries(arch))


@pytest.mark.parametrize(
  ("arch", "naming", "name", "shape"),
  [
    ("resnet44", "original", "layer3.6.bn2.running_var", (64,)),
    ("resnet44", "original", "linear.weight", (10, 64)),
    ("wrn16_2", "original", "block2.layer.0.convShortcut.weight", (64, 32, 1, 1)),
    ("resnet50", "torchvision", "layer4.0.downsample.0.weight", (2048, 1024, 1, 1)),
    ("mobilenet_v2", "torchvision", "features.1.conv.0.0.weight", (32, 1, 3, 3)),
    ("mobilenet_v2", "timm", "blocks.1.0.conv_pwl.weight", (24, 96, 1, 1)),
    ("mobilenet_v2", "timm", "blocks.0.0.conv_dw.weight", (32, 1, 3, 3)),
    ("densenet121", "torchvision", "features.denseblock4.denselayer16.conv2.weight", (32, 128, 3, 3)),
    ("densenet121", "torchvision (published file)", "features.denseblock1.denselayer1.norm.1.weight", (64,)),
    ("densenet121", "torchvision (published file)", "features.transition1.norm.weight", (256,)),
    ("efficientnet_lite0", "efficientnet-lite-pytorch", "_blocks.0._depthwise_conv.weight", (32, 1, 3, 3)),
    ("efficientnet_lite0", "timm", "blocks.6.0.bn3.running_mean", (320,)),
  ],
)
def test_known_names_and_shapes(arch, naming, name, shape):
  assert source_shapes(arch, naming)[name] == shape


def test_layouts(resnet20):
  variables = to_flax("resnet20", {**resnet20, "bn1.num_batches_tracked": np.array(5)})
  assert to_flax("ResNet-20".replace("-", ""), resnet20).keys() == {"params", "batch_stats"}
  kernel, weight = variables["params"]["layer2_0"]["conv1"]["kernel"], resnet20["layer2.0.conv1.weight"]
  assert kernel.shape == (3, 3, 16, 32)
  for o, i, h, w in [(0, 1, 2, 0), (31, 15, 0, 1)]:
    assert kernel[h, w, i, o] == weight[o, i, h, w]
  np.testing.assert_array_equal(variables["params"]["linear"]["kernel"], resnet20["linear.weight"].T)
  batch_norm = resnet20["layer1.0.bn2.weight"], resnet20["layer1.0.bn2.running_var"]
  np.testing.assert_array_equal(variables["params"]["layer1_0"]["bn2"]["scale"], batch_norm[0])
  np.testing.assert_array_equal(variables["batch_stats"]["layer1_0"]["bn2"]["var"], batch_norm[1])


def test_depthwise_kernels():
  state = seeded_state_dict(source_shapes("mobilenet_v2", "torchvision"))
  kernel = to_flax("mobilenet_v2", state)["params"]["features_1"]["conv_0_0"]["kernel"]
  assert kernel.shape == (3, 3, 1, 32)
  assert kernel[2, 1, 0, 7] == state["features.1.conv.0.0.weight"][7, 0, 2, 1]


def test_half_precision_and_double_are_converted(resnet20):
  for dtype in (np.float16, np.float64):
    variables = to_flax("resnet20", {name: array.astype(dtype) for name, array in resnet20.items()})
    weight = resnet20["conv1.weight"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(variables["params"]["conv1"]["kernel"], weight.transpose(2, 3, 1, 0), strict=True)


def test_all_differences_are_listed_at_once(resnet20):
  state = {name: array for name, array in resnet20.items() if not name.startswith(("layer1.0.conv", "bn1.running_m"))}
  state |= {
    "extra.weight": np.zeros((2, 3)),
    "layer3.2.conv2.weight": np.zeros((64, 32, 3, 3)),
    "bad\x1b[31m": np.zeros(1),
  }
  with pytest.raises(WeightsError) as error:
    to_flax("resnet20", state, origin="w.pth as resnet20")
  assert str(error.value) == (
    "w.pth as resnet20 does not fit: 3 missing: bn1.running_mean (16,); layer1.0.conv1.weight (16, 16, 3, 3); "
    "layer1.0.conv2.weight (16, 16, 3, 3) | 2 unexpected: bad\\x1b[31m (1,); extra.weight (2, 3) | "
    "1 misshapen: layer3.2.conv2.weight expected (64, 64, 3, 3) found (64, 32, 3, 3)"
  )


@pytest.mark.parametrize(("arch", "is_other"), [("resnet18", True), ("resnet44", False)])
def test_weights_none_of_which_fit_are_asked_about(resnet20, arch, is_other):
  # ResNet-18 shares 65 names with ResNet-20 and no shape; all of ResNet-20 fits into ResNet-44.
  with pytest.raises(WeightsError, match="does not fit") as error:
    to_flax(arch, resnet20)
  assert ("is it another architecture?" in str(error.value)) == is_other


def test_missing_names_follow_the_naming_of_the_file():
  state = seeded_state_dict(source_shapes("mobilenet_v2", "timm"))
  del state["blocks.2.1.conv_pw.weight"]
  with pytest.raises(WeightsError, match=r"1 missing: blocks\.2\.1\.conv_pw\.weight \(192, 32, 1, 1\)$"):
    to_flax("mobilenet_v2", state)


def test_another_architecture_is_suspected_when_no_name_fits(resnet20):
  with pytest.raises(WeightsError, match="another architecture"):
    to_flax("densenet121", resnet20)


def test_unusable_values_are_refused_by_name(resnet20):
  state = {name: array.copy() for name, array in resnet20.items()}
  state["layer2.1.conv1.weight"][3, 2, 1, 0] = np.nan
  state["linear.bias"][:2] = np.inf
  state["bn1.running_var"][4] = -1e-3
  with pytest.raises(WeightsError) as error:
    to_flax("resnet20", state)
  for part in (
    "layer2.1.conv1.weight (1 of 9216 ",
    "linear.bias (2 of 10 ",
    "bn1.running_var (1 of 16 variances are neg",
  ):
    assert part in str(error.value)
  too_large = {**resnet20, "conv1.weight": resnet20["conv1.weight"].astype(np.float64) * 1e300}
  with pytest.raises(WeightsError, match=r"conv1\.weight .*infinite"):
    to_flax("resnet20", too_large)
  with pytest.raises(WeightsError, match=r"no real numbers: conv1\.weight"):
    to_flax("resnet20", {**resnet20, "conv1.weight": resnet20["conv1.weight"] > 0})


def test_number_of_classes_is_read_off_the_classifier(resnet20, tmp_path):
  state = {**resnet20, "linear.weight": np.ones((7, 64), np.float32), "linear.bias": np.ones(7, np.float32)}
  assert make_plan("resnet20", state, None, "w").num_classes == 7
  assert to_flax("resnet20", state, 7)["params"]["linear"]["kernel"].shape == (64, 7)
  with pytest.raises(WeightsError, match=r"w has 7 classes \(linear\.weight is \(7, 64\)\), 10 were asked for"):
    to_flax("resnet20", state, 10, origin="w")
  network = convert("resnet20", save_state_dict(tmp_path / "w.pth", state))
  assert (network.num_classes, network.model_options) == (7, {"num_classes": 7})


def test_convert_options(resnet20, tmp_path):
  path = save_state_dict(tmp_path / "w.pth", resnet20, legacy=True)
  network = convert("ResNet20", path, input_mean=(0.5,) * 3, input_std=(0.25,) * 3, image_size=40)
  assert (network.input_mean, network.input_std) == ((0.5,) * 3, (0.25,) * 3)
  assert (network.image_shape, network.arch) == ((40, 40, 3), "resnet20")
  assert convert("resnet20", path).input_mean == model_info("resnet20").input_mean
  with pytest.raises(KwjaxError, match=r"unknown model 'vgg'.*resnet20"):
    convert("vgg", path)
  with pytest.raises(WeightsError, match="at least 1"):
    convert("resnet20", path, num_classes=0)
  with pytest.raises(KwjaxError, match="3 channels"):
    convert("resnet20", path, input_mean=[0.5])


def timm_names(arch: str) -> list[str]:
  """Modules in timm's order of definition: stem, depthwise-separable stage, inverted residuals, head."""
  repeats = {"mobilenet_v2": (1, 2, 3, 4, 3, 3, 1), "efficientnet_lite0": (1, 2, 2, 3, 3, 4, 1)}[arch]
  names = ["conv_stem", "bn1"]
  for stage, count in enumerate(repeats):
    layers = "conv_dw bn1 conv_pw bn2" if stage == 0 else "conv_pw bn1 conv_dw bn2 conv_pwl bn3"
    names += [f"blocks.{stage}.{block}.{layer}" for block in range(count) for layer in layers.split()]
  return [*names, "conv_head", "bn2", "classifier"]


def renamed(state: dict[str, np.ndarray], modules: list[str]) -> dict[str, np.ndarray]:
  """The same arrays under other module names, both in order of definition."""
  old = list(dict.fromkeys(name.rpartition(".")[0] for name in state))
  assert len(old) == len(modules)
  table = dict(zip(old, modules))
  return {f"{table[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": array for name, array in state.items()}


def assert_same_leaves(found, expected) -> None:
  import jax

  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_timm_mobilenet_v2_is_torchvisions_in_order_of_definition():
  names = sorted(
    source_shapes("mobilenet_v2", "torchvision"), key=lambda n: (n.startswith("classifier"), natural_order(n))
  )
  state = seeded_state_dict({name: source_shapes("mobilenet_v2", "torchvision")[name] for name in names})
  timm = renamed(state, timm_names("mobilenet_v2"))
  assert make_plan("mobilenet_v2", timm, None, "w").naming == "timm"
  assert_same_leaves(to_flax("mobilenet_v2", timm), to_flax("mobilenet_v2", state))


def test_timm_efficientnet_lite0_is_the_demo_in_order_of_definition(tmp_path):
  try:
    path = embedded_checkpoint()
  except WeightsError as error:
    pytest.skip(str(error))
  state = load_torch_state_dict(path)
  timm = renamed(state, timm_names("efficientnet_lite0"))
  assert_same_leaves(to_flax("efficientnet_lite0", timm), to_flax("efficientnet_lite0", state))
  converted = convert("efficientnet_lite0", save_state_dict(tmp_path / "timm.pth", timm))
  assert (converted.source["naming"], converted.input_mean, converted.input_std) == ("timm", (0.5,) * 3, (0.5,) * 3)


def test_published_densenet_names_are_those_that_torchvisions_loader_renames():
  torch = pytest.importorskip("torch")
  torchvision = import_torchvision()
  state = seeded_state_dict(source_shapes("densenet121", "torchvision (published file)"))
  assert sum(".norm.1." in name or ".conv.2." in name for name in state) == 58 * 5
  network = torchvision.models.densenet121(weights=None)
  counters = {name: value for name, value in network.state_dict().items() if name.endswith("tracked")}
  published = {name: torch.from_numpy(array) for name, array in state.items()} | counters
  source = types.SimpleNamespace(get_state_dict=lambda **_: published)
  torchvision.models.densenet._load_state_dict(network, source, progress=False)
  loaded = {name: value.numpy() for name, value in network.state_dict().items()}
  assert_same_leaves(to_flax("densenet121", loaded), to_flax("densenet121", state))
