"""Reference networks in PyTorch with weights that NumPy alone can make again, so that their logits can be recorded."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.torch_networks import import_torchvision

NUM_CLASSES = 10
TORCHVISION = ("resnet18", "resnet50", "mobilenet_v2", "densenet121")
IMAGES_SHAPE = (2, 64, 64, 3)


def seeded_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Weights that depend on name and shape alone: He-scaled kernels, random affine parameters and running statistics."""
  # RandomState's streams are frozen for good, those of default_rng are not.
  random = np.random.RandomState(zlib.crc32(name.encode()))
  leaf = name.rpartition(".")[2]
  if leaf == "num_batches_tracked":
    return np.array(1)
  if leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
    return random.uniform(0.5, 1.5, shape).astype(np.float32)
  if len(shape) == 1:
    return (0.2 * random.standard_normal(shape)).astype(np.float32)
  fan_in = int(np.prod(shape[1:]))
  return (random.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)


def seeded_state_dict(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  return {name: seeded_array(name, shape) for name, shape in shapes.items()}


def random_images(shape: tuple[int, ...]) -> np.ndarray:
  """Images in [0, 1], NHWC."""
  return np.random.RandomState(0).uniform(0, 1, shape).astype(np.float32)


def torchvision_network(arch: str) -> Any:
  """torchvision's own network with the seeded weights, in evaluation mode."""
  import torch

  network = getattr(import_torchvision().models, arch)(weights=None, num_classes=NUM_CLASSES)
  shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
  network.load_state_dict({name: torch.from_numpy(array) for name, array in seeded_state_dict(shapes).items()})
  return network.eval()


def efficientnet_lite0(state_dict: Mapping[str, np.ndarray]) -> Any:
  """The PyTorch definition of EfficientNet-Lite0, in evaluation mode."""
  import torch
  from efficientnet_lite_pytorch import EfficientNet

  network = EfficientNet.from_name("efficientnet-lite0")
  network.load_state_dict({name: torch.from_numpy(array) for name, array in state_dict.items()})
  return network.eval()


def torch_logits(network: Any, images: np.ndarray, mean: Any, std: Any) -> np.ndarray:
  """Logits of a PyTorch network for NHWC images in [0, 1]."""
  import torch

  normalised = ((images - np.float32(mean)) / np.float32(std)).astype(np.float32)
  with torch.no_grad():
    return network(torch.from_numpy(normalised.transpose(0, 3, 1, 2).copy())).numpy()
