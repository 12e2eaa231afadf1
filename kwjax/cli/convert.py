"""`kwjax convert`: weights of PyTorch or safetensors as a network folder."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the command; those of `python -m weights_conversion`."""

  arch: str
  """Architecture, such as resnet20 (an unknown name lists the known ones)."""
  source: str
  """Weights: a file, a URL, `torchvision`, `torchvision:V2` or `demo`."""
  out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FOLDER")]
  """New folder to write."""
  num_classes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
  """Insist on N classes. Default: what the file has."""
  input_mean: tuple[float, ...] | None = None
  """Mean of the training images in [0, 1], a number a channel. Default: the architecture's."""
  input_std: tuple[float, ...] | None = None
  """Standard deviation, likewise."""
  image_size: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
  """Height and width. Default: the architecture's."""
  overwrite: bool = False
  """Replace a network that is already in FOLDER."""
  quiet: bool = False
  """No progress bar, no summary."""


def run(options: Options) -> int:
  """Convert and write; returns the exit status."""
  from weights_conversion.__main__ import convert_to_folder

  return convert_to_folder(**dataclasses.asdict(options))
