"""`kwjax measure`: J_KL and accuracy of a network on a set of images."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Annotated, Any

import numpy as np
import tyro

from kwjax.analysis.similarity import measure
from kwjax.batchnorm import INPUT, OUTLIER_NATS
from kwjax.cli.command import load_any, start
from kwjax.errors import NoBatchNormError
from kwjax.network import Network
from kwjax.runtime.data import ImageData, load_data
from kwjax.runtime.devices.parallel import DeviceGroup
from kwjax.runtime.evaluate import evaluate, wilson_interval
from kwjax.runtime.reporting.messages import log


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the command."""

  network: Annotated[pathlib.Path, tyro.conf.arg(metavar="FOLDER")]
  """A float or quantized network."""
  data: str
  """Images: zip or folder of CLASS_*.jpg, class folders, idx files, FILE.npz:test, tfds:NAME."""
  limit: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
  """Take the first N images only."""
  batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 256
  """Images a forward pass, at most."""
  devices: int | None = None
  """Devices that the work is spread over. Default: all accelerators, or one a CPU core."""


def run(options: Options) -> int:
  """Measure and print as JSON; returns the exit status.

  Raises:
    KwjaxError: anything the user can mend.
  """
  group = start(options.devices, None, None, None)
  network = load_any(options.network)
  data = load_data(options.data, image_shape=network.image_shape, num_classes=network.num_classes, limit=options.limit)
  found: dict[str, Any] = {"network": network.name, "data": data.name, "images": len(data)}
  if isinstance(network, Network):
    found |= _similarity(network, data, options.batch_size, group)
  else:
    log("J_KL is left out: it is a property of the float network")
  if data.labels is None:
    log("accuracy is left out: the images have no labels")
  else:
    accuracy = evaluate(network, data, batch_size=options.batch_size, devices=group)
    low, high = wilson_interval(round(accuracy.top1 * accuracy.count), accuracy.count)
    log(f"top-1 {accuracy.top1:.2%} of {accuracy.count} images (95 % interval {low:.2%} to {high:.2%})")
    found |= {"top1": accuracy.top1, "top5": accuracy.top5, "top1_interval": [low, high]}
  print(json.dumps(found, indent=2))
  return 0


def _similarity(network: Network, data: ImageData, batch_size: int, group: DeviceGroup) -> dict[str, Any]:
  batches = (images for images, _, _ in data.batches(batch_size))
  try:
    found = measure(network, batches, include_input=True, devices=group)
  except NoBatchNormError:
    log(f"J_KL is left out: {network.name} has no BatchNorm")
    return {}
  layers = found.layer_means()
  without_input = float(np.mean([value for layer, value in layers.items() if layer != INPUT]))
  log(f"J_KL {float(found.jkl):.4g} with the input as a layer, {without_input:.4g} without")
  if found.outliers():
    count = f"{found.outliers()} of {found.channels():,} channels"
    log(f"without {count}, which have more than {OUTLIER_NATS:.0f} nats: {found.trimmed():.4g}")
  return {
    "jkl": float(found.jkl),
    "jkl_without_input": without_input,
    "jkl_trimmed": found.trimmed(),
    "outliers": found.outliers(),
    "per_layer": layers,
  }
