"""Top-1 of a network on labelled images, as the studies store it."""

from __future__ import annotations

from typing import Any

from kwjax.compression.workspace import Workspace
from kwjax.errors import DataError
from kwjax.network import Network
from kwjax.quantization import QuantizedNetwork
from kwjax.runtime.data import ImageData
from kwjax.runtime.evaluate import score


def top1(workspace: Workspace, network: Network | QuantizedNetwork, data: ImageData) -> dict[str, Any]:
  """Top-1 accuracy on labelled images, `{"value": fraction, "count": images}`.

  Raises:
    DataError: the images have no labels.
    NonFiniteError: the network returns NaN or infinite logits.
    Interrupted: the run was asked to stop.
  """
  workspace.stop_if_asked()
  found = score(
    network, data, batch_size=workspace.batch_size, devices=workspace.group, should_stop=workspace.should_stop
  ).accuracy
  if found is None:
    raise DataError(f"{data.name} has no labels, so there is no accuracy on it")
  return {"value": found.top1, "count": found.count}
