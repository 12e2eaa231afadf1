"""`kwjax info`: versions, devices, architectures, and what is in a network folder."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Annotated

import jax
import numpy as np
import tyro

from kwjax.cli.command import load_any
from kwjax.cli.versions import version_text
from kwjax.intercept import batch_norm_layers, layers, matmul_layers
from kwjax.models import known_models
from kwjax.network import Network
from kwjax.quantization import QuantizedNetwork


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the command."""

  network: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FOLDER")] = None
  """A float or quantized network to describe."""


def run(options: Options) -> int:
  """Print; returns the exit status.

  Raises:
    KwjaxError: the folder holds no network.
  """
  if options.network is None:
    print(f"{version_text()}\narchitectures {', '.join(known_models())}")
  else:
    print(describe(load_any(options.network)))
  return 0


def describe(network: Network | QuantizedNetwork) -> str:
  """A network in a few lines."""
  base = network.network if isinstance(network, QuantizedNetwork) else network
  weights = sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(network.variables["params"]))
  operations = sum(layer.multiplications for layer in layers(base))
  lines = [
    f"name            {network.name}",
    f"architecture    {base.arch or 'unknown'}",
    f"input           {'x'.join(map(str, base.image_shape))}, values in [0, 1], mean {_numbers(base.input_mean)}, "
    f"std {_numbers(base.input_std)}",
    f"classes         {base.num_classes}",
    f"parameters      {weights:,}",
    f"multiply-adds   {operations:,} an image",
    f"layers          {len(matmul_layers(base))} convolutions and dense layers, "
    f"{len(batch_norm_layers(base))} BatchNorm layers",
    f"weights from    {base.source.get('file', 'unknown')}",
  ]
  if isinstance(network, QuantizedNetwork):
    lines.append(f"quantization    {network.rules.describe()}")
  else:
    lines.append("quantization    none: float32")
  return "\n".join(lines)


def _numbers(values: Sequence[float]) -> str:
  return " ".join(f"{value:.4g}" for value in values)
