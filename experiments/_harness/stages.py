"""The stages that all experiments share, each a function of where the run stands and of what it works on."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments._harness import event_log
from experiments._harness.common import Stages, say
from experiments._harness.options import Options, Sizes
from kwjax.analysis.similarity import measure
from kwjax.batchnorm import INPUT
from kwjax.distillation import DistillConfig, distill_with_history
from kwjax.errors import DataError, Interrupted, NoBatchNormError
from kwjax.intercept import Forwardable
from kwjax.network import Network
from kwjax.quantization import (
  Histogram,
  QuantizedNetwork,
  QuantRules,
  RangeTable,
  observe_histograms,
  observe_ranges,
  quantize,
  ranges_from,
)
from kwjax.runtime import processes
from kwjax.runtime.data import ImageData
from kwjax.runtime.evaluate import predict, score
from kwjax.runtime.parallel import DeviceGroup
from kwjax.runtime.tensorboard import EventLog
from kwjax.runtime.workdir import Shutdown
from kwjax.synthesis import SampleSet, SynthesisConfig, synthesize

GAUSSIAN, REAL = "gaussian", "real"
SYNTHESIS_KEY, GAUSSIAN_KEY, CALIBRATION_KEY, DISTILL_KEY, REAL_KEY = range(5)


def stream_key(seed: int, stream: int) -> jax.Array:
  """PRNG key of one stage of a run; equal seeds give the same images in every experiment."""
  return jax.random.fold_in(jax.random.key(seed), stream)


class Site(NamedTuple):
  """Where work is done.

  Attributes:
    network: the float network.
    group: devices that the work is spread over.
    stages: the run's folder and what is finished in it.
    shutdown: whether the run was asked to stop.
    scratch: folder for the checkpoints of a fine-tuning.
    checkpoint_seconds: least time between two saved states of a synthesis.
    checkpoint_steps: fine-tuning steps between two saved states.
    log: where curves go for TensorBoard, in the main process alone; or None.
  """

  network: Network
  group: DeviceGroup
  stages: Stages
  shutdown: Shutdown
  scratch: pathlib.Path
  checkpoint_seconds: float = 20.0
  checkpoint_steps: int = 200
  log: EventLog | None = None

  def should_stop(self) -> bool:
    """Whether this process was asked to stop."""
    return self.shutdown.requested

  def shutdown_point(self) -> None:
    """Leave here if the run was asked to stop.

    Raises:
      Interrupted: finished stages are kept.
    """
    if processes.any_stop(self.shutdown.requested):
      raise Interrupted(f"stopped; finished stages are in {self.stages.folder}")


def make_images(site: Site, config: SynthesisConfig, folder: str, *, count: int, key: jax.Array) -> SampleSet:
  """Images of one scheme, resuming what is in the folder.

  Args:
    site: where.
    config: how they are made.
    folder: name of their folder within the run's.
    count: distinct images.
    key: of everything random in them.
  """
  samples = synthesize(
    site.network,
    config.replace(batch_size=config.batch_size if config.is_optimized else count),
    num_images=count,
    key=key,
    workdir=site.stages.folder / folder,
    devices=site.group,
    progress=config.is_optimized,
    checkpoint_seconds=site.checkpoint_seconds,
    should_stop=site.should_stop,
    callback=event_log.synthesis_callback(site.log, folder, config),
  )
  event_log.log_samples(site.log, folder, config, samples)
  return samples


def spread_images(data: ImageData, count: int) -> np.ndarray:
  """Up to `count` images f32[n,h,w,c] of a data set, drawn evenly over it."""
  count = min(count, len(data))
  return data.read(np.linspace(0, len(data) - 1, count).round().astype(int))


def drawn_images(data: ImageData, count: int, key: jax.Array) -> np.ndarray:
  """Up to `count` different images f32[n,h,w,c] of a data set, drawn at random, equally many a class where it has labels."""
  return data.read(drawn_indices(data, count, key))


def drawn_indices(data: ImageData, count: int, key: jax.Array) -> np.ndarray:
  """Which images `drawn_images` reads, in its order; i[n]."""
  order = np.asarray(jax.random.permutation(key, len(data)))
  if data.labels is not None:
    labels = data.labels[order]
    rank = np.zeros(len(labels), int)
    for label in np.unique(labels):
      rank[labels == label] = np.arange(np.sum(labels == label))
    order = order[np.argsort(rank, kind="stable")]
  return order[:count]


def similarity(site: Site, images: np.ndarray | jax.Array) -> dict[str, Any] | None:
  """J_KL of a set of images with the input as a layer, without it, and by layer; None without BatchNorm."""
  site.shutdown_point()
  try:
    found = measure(
      site.network, images, include_input=True, batch_size=32, devices=site.group, should_stop=site.should_stop
    )
  except NoBatchNormError:
    return None
  layers = found.layer_means()
  without_input = [value for layer, value in layers.items() if layer != INPUT]
  return {
    "jkl": float(found.jkl),
    "without_input": float(np.mean(without_input)),
    "per_layer": layers,
    "count": found.count,
  }


def answers(site: Site, images: np.ndarray) -> dict[str, Any]:
  """What the float network says of each image: `{"classes": [index], "confidences": [its probability]}`.

  Args:
    site: where.
    images: f32[n,h,w,c] in [0,1].
  """
  site.shutdown_point()
  size = 256 if site.network.image_shape[0] <= 64 else 32
  own = predict(site.network, images, batch_size=size, devices=site.group, should_stop=site.should_stop)
  logits = processes.gather(own)
  probabilities = np.exp(logits - logits.max(1, keepdims=True))
  probabilities /= probabilities.sum(1, keepdims=True)
  return {"classes": logits.argmax(1).tolist(), "confidences": probabilities.max(1).astype(float).tolist()}


def range_table(site: Site, name: str, images: np.ndarray, *, words: str) -> RangeTable:
  """Activation extremes of every image, kept between runs; one table serves all precisions.

  Args:
    site: where.
    name: of the stage.
    images: f32[n,h,w,c] in [0,1].
    words: what the images are called.
  """
  site.shutdown_point()

  def compute() -> dict[str, Any]:
    say(f"observing activation ranges on {len(images)} {words} images")
    table = observe_ranges(
      site.network, images, batch_size=32, progress=True, devices=site.group, should_stop=site.should_stop
    )
    return table.to_json()

  return RangeTable.from_json(site.stages.once(name, compute))


def histogram_table(
  site: Site, name: str, images: np.ndarray, table: RangeTable, *, words: str
) -> dict[str, Histogram]:
  """Distribution of every layer's input over the images, kept between runs; serves all precisions.

  Args:
    site: where.
    name: of the stage.
    images: f32[n,h,w,c] in [0,1].
    table: their extremes, of `range_table`.
    words: what the images are called.
  """
  site.shutdown_point()

  def compute() -> dict[str, Any]:
    say(f"observing the distribution of activations on {len(images)} {words} images")
    found = observe_histograms(
      site.network, images, table, batch_size=32, progress=True, devices=site.group, should_stop=site.should_stop
    )
    return {layer: [np.asarray(field).tolist() for field in histogram] for layer, histogram in found.items()}

  stored = site.stages.once(name, compute)
  return {layer: Histogram(*map(np.asarray, fields)) for layer, fields in stored.items()}


def calibrated(
  network: Network, table: RangeTable, rules: QuantRules, chosen: Sizes, *, key: jax.Array
) -> QuantizedNetwork:
  """The low-precision copy whose activation ranges are drawn from a table of extremes.

  Args:
    network: the float network.
    table: of `range_table`.
    rules: bits of every layer.
    chosen: its `calibration_steps` and `calibration_batch`.
    key: of the draws.
  """
  steps, batch_size = chosen.calibration_steps, chosen.calibration_batch
  return quantize(network, rules, ranges_from(table, rules, key=key, steps=steps, batch_size=batch_size))


def top1(site: Site, network: Network | QuantizedNetwork, data: ImageData) -> dict[str, Any]:
  """Top-1 accuracy on labelled images, `{"value": fraction, "count": images}`.

  Raises:
    DataError: the images have no labels.
    NonFiniteError: the network returns NaN or infinite logits.
    Interrupted: the run was asked to stop.
  """
  site.shutdown_point()
  size = 256 if site.network.image_shape[0] <= 64 else 32
  found = score(network, data, batch_size=size, devices=site.group, should_stop=site.should_stop).accuracy
  if found is None:
    raise DataError(f"{data.name} has no labels, so there is no accuracy on it")
  return {"value": found.top1, "count": found.count}


def fine_tuned(
  site: Site,
  student: QuantizedNetwork,
  images: np.ndarray,
  config: DistillConfig,
  *,
  key: jax.Array,
  teacher: Forwardable | None = None,
) -> QuantizedNetwork:
  """The student after distilling a teacher into it, by default the float network; checkpoints are in `site.scratch`."""
  site.shutdown_point()
  say(f"fine-tuning {student.name}: {config.steps} steps")
  trained, history = distill_with_history(
    student,
    site.network if teacher is None else teacher,
    images,
    config.replace(checkpoint_every=site.checkpoint_steps),
    key=key,
    workdir=site.scratch,
    devices=site.group,
    progress=True,
    callback=lambda step, metrics, _: event_log.log_distillation(site.log, config, [metrics]),
  )
  event_log.log_distillation(site.log, config, history)
  return trained


def distill_config(
  options: Options, network: Network, chosen: Sizes, scheme: str, *, near: bool = False
) -> DistillConfig:
  """Settings of a fine-tuning: published ones under --preset paper, else those that suit a short run.

  Args:
    options: preset, and what was asked for instead.
    network: its image size tells CIFAR's settings from ImageNet's.
    chosen: steps and batch size.
    scheme: of the images.
    near: whether the student's corrected moments have brought it near the float network already.
  """
  small = network.image_shape[0] <= 64
  # Noise has other statistics than data, and the statistics of a batch would throw a correction away, so the running ones
  # are kept; and without the batch's own only a tenth of the learning rate is stable, or less next to a good start.
  frozen = scheme == GAUSSIAN or near
  changes: dict[str, Any] = {
    "steps": chosen.distill_steps,
    "batch_size": chosen.distill_batch_size,
    "batch_norm": "frozen" if frozen else "train",
  }
  if options.preset != "paper" or options.distill_steps is not None:
    changes["warmup_steps"] = chosen.distill_steps // 20
  if options.distill_learning_rate is not None:
    changes["learning_rate"] = options.distill_learning_rate
  elif frozen:
    changes["learning_rate"] = 0.01 if options.preset == "paper" else 0.0001 if near else 0.001
  name = ("cifar" if small else "imagenet") if options.preset == "paper" else "short"
  return DistillConfig.preset(name, **changes)
