"""The networks of the benchmarks in PyTorch: the peers that kwjax is timed against, and the source of its weights."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from kwjax.errors import KwjaxError
from kwjax.models import model_info
from kwjax.network import Network

EXTRA = "the benchmarks compare with PyTorch: pip install 'kwjax[bench]'"


def import_torch() -> Any:
  """PyTorch.

  Raises:
    KwjaxError: it is not installed; names the extra.
  """
  try:
    import torch
  except ImportError as error:
    raise KwjaxError(f"{EXTRA} ({error})") from error
  return torch


def _own_torchvision() -> Any:
  try:
    import torchvision
  except ImportError as error:
    raise KwjaxError(f"{EXTRA} ({error})") from error
  return torchvision


@functools.cache
def import_torchvision() -> Any:
  """torchvision, also where its compiled operators do not fit the installed PyTorch: the networks need none of them.

  Raises:
    KwjaxError: it is not installed; names the extra.
  """
  torch = import_torch()
  try:
    return _own_torchvision()
  except RuntimeError:  # its operators are not there: they are declared, and it is imported anew
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
      del sys.modules[name]
  library = torch.library.Library("torchvision", "FRAGMENT")
  for signature in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor d, Tensor s, float t) -> Tensor",
  ):
    with contextlib.suppress(RuntimeError):
      library.define(signature)
  torchvision = _own_torchvision()
  torchvision.operators_kept_alive = library
  return torchvision


def _cifar_resnet(depth: int) -> Any:
  """ResNet for CIFAR-10 with parameter-free shortcuts (option A), He et al. (2015), section 4.2."""
  torch = import_torch()
  nn, functional = torch.nn, torch.nn.functional

  class Block(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, inputs: int, features: int, stride: int) -> None:
      super().__init__()
      self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
      self.bn1 = nn.BatchNorm2d(features)
      self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
      self.bn2 = nn.BatchNorm2d(features)
      self.stride, self.missing = stride, features - inputs

    def forward(self, x: Any) -> Any:
      y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
      if self.missing:
        x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.missing // 2, self.missing // 2))
      return functional.relu(x + y)

  class CifarResNet(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
      super().__init__()
      self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
      inputs = 16
      for stage, features in enumerate((16, 32, 64), 1):
        blocks = []
        for block in range((depth - 2) // 6):
          blocks.append(Block(inputs, features, 2 if stage > 1 and block == 0 else 1))
          inputs = features
        setattr(self, f"layer{stage}", nn.Sequential(*blocks))
      self.linear = nn.Linear(64, 10)

    def forward(self, x: Any) -> Any:
      x = functional.relu(self.bn1(self.conv1(x)))
      x = self.layer3(self.layer2(self.layer1(x)))
      return self.linear(x.mean((2, 3)))

  return CifarResNet()


def torch_network(arch: str, *, image_size: int | None = None) -> Any:
  """A randomly initialized network in evaluation mode whose running statistics are those of a batch of noise.

  Args:
    arch: resnet20, resnet32, resnet44, resnet56, resnet110, efficientnet_lite0, or a name of torchvision's.
    image_size: side of the noise images in pixels; None takes the architecture's.

  Raises:
    KwjaxError: the architecture has no PyTorch form here, or a package is missing.
  """
  torch = import_torch()
  torch.manual_seed(0)
  info = model_info(arch)
  if info.family == "resnet_cifar":
    network = _cifar_resnet(int(arch.removeprefix("resnet")))
  elif info.family == "efficientnet_lite":
    try:
      from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
      raise KwjaxError(f"{EXTRA} ({error})") from error
    network = EfficientNet.from_name("efficientnet-lite0")
  elif info.family in ("resnet", "mobilenet_v2", "densenet") and info.image_shape[0] == 224:
    network = getattr(import_torchvision().models, arch)(weights=None)
  else:
    raise KwjaxError(f"there is no PyTorch form of {arch} to compare with")
  for module in network.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      module.momentum = None
  size = image_size or info.image_shape[0]
  network.train()
  with torch.no_grad():
    network(torch.randn(8, 3, size, size))
  return network.eval()


def kwjax_network(arch: str, *, image_size: int | None = None) -> Network:
  """The network of `torch_network` with the same weights, by the converter that users call.

  PyTorch runs in a process of its own and is gone afterwards: its memory is no part of what kwjax needs.

  Raises:
    KwjaxError: PyTorch cannot make the network; says why.
  """
  from weights_conversion.convert import convert

  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / f"{arch}.pth"
    command = [sys.executable, "-m", "benchmarks.torch_networks", arch, str(image_size or 0), str(path)]
    process = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    if process.returncode:
      reason = process.stderr.strip().rpartition("\n")[2] or f"its process ended with {process.returncode}"
      raise KwjaxError(f"PyTorch cannot make {arch}: {reason}")
    return convert(arch, str(path), image_size=image_size)


if __name__ == "__main__":
  _, _arch, _size, _file = sys.argv
  try:
    import_torch().save(torch_network(_arch, image_size=int(_size) or None).state_dict(), _file)
  except KwjaxError as error:
    sys.exit(str(error))
