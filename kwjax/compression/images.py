"""The images of a compression: made of the network or read from a data set, and what the network says of them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from kwjax.analysis.similarity import measure
from kwjax.batchnorm import INPUT, OUTLIER_NATS
from kwjax.compression import event_log
from kwjax.compression.workspace import Workspace
from kwjax.errors import NoBatchNormError
from kwjax.runtime.data import ImageData
from kwjax.runtime.devices import processes
from kwjax.runtime.evaluate import predict
from kwjax.synthesis import SampleSet, SynthesisConfig, synthesize


def make_images(workspace: Workspace, config: SynthesisConfig, folder: str, *, count: int, key: jax.Array) -> SampleSet:
  """Images of one scheme, resuming what is in the folder.

  Args:
    workspace: where.
    config: how they are made.
    folder: name of their folder within the run's.
    count: distinct images.
    key: of everything random in them.
  """
  samples = synthesize(
    workspace.network,
    config.replace(batch_size=config.batch_size if config.is_optimized else count),
    num_images=count,
    key=key,
    workdir=workspace.results.subfolder(folder),
    devices=workspace.group,
    progress=config.is_optimized and workspace.progress,
    checkpoint_seconds=workspace.checkpoint_seconds,
    should_stop=workspace.should_stop,
    callback=event_log.synthesis_callback(workspace.events, folder, config),
  )
  event_log.log_samples(workspace.events, folder, config, samples)
  return samples


def spread_images(data: ImageData, count: int) -> np.ndarray:
  """Up to `count` images f32[n,h,w,c] of a data set, drawn evenly over it."""
  count = min(count, len(data))
  return data.read(np.linspace(0, len(data) - 1, count).round().astype(int))


def similarity(workspace: Workspace, images: np.ndarray | jax.Array) -> dict[str, Any] | None:
  """J_KL of a set of images with the input as a layer, without it, and by layer; None without BatchNorm."""
  workspace.stop_if_asked()
  try:
    found = measure(
      workspace.network,
      images,
      include_input=True,
      batch_size=32,
      devices=workspace.group,
      should_stop=workspace.should_stop,
    )
  except NoBatchNormError:
    return None
  layers = found.layer_means()
  without_input = [value for layer, value in layers.items() if layer != INPUT]
  return {
    "jkl": float(found.jkl),
    "without_input": float(np.mean(without_input)),
    "trimmed": found.trimmed(),
    "outliers": found.outliers(),
    "channels": found.channels(),
    "outlier_nats": OUTLIER_NATS,
    "per_layer": layers,
    "count": found.count,
  }


def answers(workspace: Workspace, images: np.ndarray) -> dict[str, Any]:
  """What the float network says of each image: `{"classes": [index], "confidences": [its probability]}`.

  Args:
    workspace: where.
    images: f32[n,h,w,c] in [0,1].
  """
  workspace.stop_if_asked()
  own = predict(
    workspace.network,
    images,
    batch_size=workspace.batch_size,
    devices=workspace.group,
    should_stop=workspace.should_stop,
  )
  logits = processes.gather(own)
  probabilities = np.exp(logits - logits.max(1, keepdims=True))
  probabilities /= probabilities.sum(1, keepdims=True)
  return {"classes": logits.argmax(1).tolist(), "confidences": probabilities.max(1).astype(float).tolist()}
