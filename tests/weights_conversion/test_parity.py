"""Converted networks answer as the originals do: against PyTorch where it is installed, and against recorded logits."""

from __future__ import annotations

import functools
import importlib.util
import pathlib

import jax
import numpy as np
import pytest
from checkpoint_files import save_state_dict
from reference_networks import (
  IMAGES_SHAPE,
  NUM_CLASSES,
  TORCHVISION,
  efficientnet_lite0,
  random_images,
  seeded_state_dict,
  torch_logits,
  torchvision_network,
)

from kwjax.errors import WeightsError
from kwjax.models import model_info
from kwjax.network import Network, load_network
from weights_conversion import convert, embedded_checkpoint, load_torch_state_dict
from weights_conversion.mapping import LEAVES, flax_entries
from weights_conversion.naming import namings

RECORDED = pathlib.Path(__file__).with_name("recorded_logits.npz")
TOLERANCE = 1e-4


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
  return float(np.abs(found - expected).max() / np.abs(expected).max())


def source_shapes(arch: str) -> dict[str, tuple[int, ...]]:
  """What a state dict of `arch` with few classes holds, by the first naming."""
  rule = next(iter(namings(arch, [entry.module for entry in flax_entries(arch)]).values()))
  classes = model_info(arch).num_classes
  shapes = {}
  for entry in flax_entries(arch):
    shape = tuple(NUM_CLASSES if n == classes and "params" in entry.path else n for n in entry.torch_shape)
    shapes[f"{rule(entry.module)}.{LEAVES[entry.path[0], entry.path[-1]]}"] = shape
  return shapes


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  """`arch -> (network converted from a file written without PyTorch, its logits on the random images)`."""

  @functools.cache
  def make(arch: str) -> tuple[Network, np.ndarray]:
    path = tmp_path_factory.mktemp("weights") / f"{arch}.pth"
    save_state_dict(path, seeded_state_dict(source_shapes(arch)))
    network = convert(arch, path)
    assert network.model_options["num_classes"] == NUM_CLASSES
    return network, np.asarray(jax.jit(network.apply)(random_images(IMAGES_SHAPE)))

  return make


@pytest.mark.parametrize("arch", TORCHVISION)
def test_torchvision_networks_agree_with_recorded_logits(arch, converted):
  with np.load(RECORDED) as recorded:
    expected = recorded[arch]
  assert expected.std() > 0.01
  assert relative_error(converted(arch)[1], expected) < TOLERANCE


@pytest.mark.parametrize("arch", TORCHVISION)
def test_torchvision_networks_agree_with_torchvision(arch, converted, tmp_path):
  torch = pytest.importorskip("torch")
  if importlib.util.find_spec("torchvision") is None:  # importing it here would fail, see import_torchvision
    pytest.skip("needs torchvision")
  network, logits = converted(arch)
  original = torchvision_network(arch)
  expected = torch_logits(original, random_images(IMAGES_SHAPE), network.input_mean, network.input_std)
  assert relative_error(logits, expected) < TOLERANCE
  # What torchvision itself saves becomes the very same variables.
  torch.save({"model": torch.nn.DataParallel(original).state_dict()}, tmp_path / "saved.pth")
  saved = convert(arch, tmp_path / "saved.pth", num_classes=NUM_CLASSES)
  jax.tree.map(np.testing.assert_array_equal, saved.variables, network.variables)


@pytest.fixture(scope="module")
def lite0():
  try:
    embedded_checkpoint()
  except WeightsError as error:
    pytest.skip(str(error))
  network = convert("efficientnet_lite0", "demo")
  return network, np.asarray(jax.jit(network.apply)(random_images((1, 224, 224, 3))))


def test_efficientnet_lite0_agrees_with_recorded_logits(lite0):
  with np.load(RECORDED) as recorded:
    assert relative_error(lite0[1], recorded["efficientnet_lite0"]) < TOLERANCE


def test_efficientnet_lite0_agrees_with_its_torch_definition(lite0):
  pytest.importorskip("torch")
  pytest.importorskip("efficientnet_lite_pytorch")
  network, logits = lite0
  original = efficientnet_lite0(load_torch_state_dict(embedded_checkpoint()))
  expected = torch_logits(original, random_images((1, 224, 224, 3)), network.input_mean, network.input_std)
  assert relative_error(logits, expected) < TOLERANCE


@pytest.mark.parametrize(
  ("arch", "file", "top1"),
  [("resnet20", "resnet20-12fca82f.th", 91.64), ("resnet44", "resnet44-014dd654.th", 93.41)],
)
def test_cifar_networks_reach_their_accuracy(shared_data, tmp_path, arch, file, top1):
  from weights_conversion.__main__ import main

  folder = tmp_path / arch
  assert main(["--arch", arch, "--source", str(shared_data / "weights" / file), "--out", str(folder), "--quiet"]) == 0
  network = load_network(folder)
  with np.load(shared_data / "cifar10" / "cifar10_subset.npz") as data:
    images, labels = data["test_images"].astype(np.float32) / 255, data["test_labels"]
  assert len(images) == 1017
  apply = jax.jit(network.apply)
  correct = sum(
    int((np.argmax(apply(images[i : i + 339]), 1) == labels[i : i + 339]).sum()) for i in range(0, 1017, 339)
  )
  assert abs(correct - round(top1 / 100 * 1017)) <= 1
