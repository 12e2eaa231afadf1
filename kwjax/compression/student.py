"""A student of a float network: calibrated on images by a method, and fine-tuned on them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from kwjax.compression import event_log
from kwjax.compression.workspace import Workspace, is_small
from kwjax.distillation import DistillConfig, distill_with_history
from kwjax.intercept import Forwardable
from kwjax.network import Network
from kwjax.quantization import (
  Equalized,
  Histogram,
  QuantizedNetwork,
  QuantRules,
  RangeTable,
  correct_bias,
  equalize,
  histogram_ranges,
  observe_histograms,
  observe_ranges,
  quantize,
  ranges_from,
)
from kwjax.quantization.methods import Correction, Method
from kwjax.reconstruction import ReconstructConfig, UnitReport, reconstruct_with_report


def range_table(workspace: Workspace, name: str, images: np.ndarray, *, description: str) -> RangeTable:
  """Activation extremes of every image, kept between runs; one table serves all precisions.

  Args:
    workspace: where.
    name: of the result.
    images: f32[n,h,w,c] in [0,1].
    description: what the images are called.
  """
  workspace.stop_if_asked()

  def compute() -> dict[str, Any]:
    workspace.log(f"observing activation ranges on {len(images)} {description} images")
    table = observe_ranges(
      workspace.network,
      images,
      batch_size=32,
      progress=workspace.progress,
      devices=workspace.group,
      should_stop=workspace.should_stop,
    )
    return table.to_json()

  return RangeTable.from_json(workspace.results.once(name, compute))


def histogram_table(
  workspace: Workspace, name: str, images: np.ndarray, table: RangeTable, *, description: str
) -> dict[str, Histogram]:
  """Distribution of every layer's input over the images, kept between runs; serves all precisions.

  Args:
    workspace: where.
    name: of the result.
    images: f32[n,h,w,c] in [0,1].
    table: their extremes, of `range_table`.
    description: what the images are called.
  """
  workspace.stop_if_asked()

  def compute() -> dict[str, Any]:
    workspace.log(f"observing the distribution of activations on {len(images)} {description} images")
    found = observe_histograms(
      workspace.network,
      images,
      table,
      batch_size=32,
      progress=workspace.progress,
      devices=workspace.group,
      should_stop=workspace.should_stop,
    )
    return {layer: [np.asarray(field).tolist() for field in histogram] for layer, histogram in found.items()}

  stored = workspace.results.once(name, compute)
  return {layer: Histogram(*map(np.asarray, fields)) for layer, fields in stored.items()}


def calibrated(
  workspace: Workspace,
  name: str,
  images: np.ndarray,
  rules: QuantRules,
  method: Method,
  *,
  key: jax.Array,
  description: str,
) -> QuantizedNetwork:
  """The student that a method of calibration makes with some images, with all corrections that the method has.

  Args:
    workspace: where; its network is the float one.
    name: under which what is observed of the images is kept; the same for all methods and precisions.
    images: f32[n,h,w,c] in [0,1].
    rules: bits of every layer; their ranges are replaced by the method's.
    method: what is done.
    key: of the draws.
    description: what the images are called.
  """
  student = uncorrected(workspace, name, images, rules, method, key=key, description=description)
  return corrected(workspace, student, images, method.corrections()[-1])


def corrected(
  workspace: Workspace,
  student: QuantizedNetwork,
  images: np.ndarray,
  correction: Correction,
  *,
  reference: Network | None = None,
) -> QuantizedNetwork:
  """The student with corrected moments.

  Args:
    workspace: where.
    student: to correct.
    images: f32[n,h,w,c] in [0,1].
    correction: what is corrected.
    reference: whose moments are wanted. Default: the student's own float network, which it is only before a reconstruction.
  """
  if correction == "none":
    return student
  workspace.stop_if_asked()
  size = 128 if is_small(workspace.network) else 32
  # On one device: a mean over several is rounded otherwise, and a run must end alike wherever it goes on.
  return correct_bias(
    student, images, reference=reference, variance=correction == "moments", batch_size=size, devices=1
  )


def uncorrected(
  workspace: Workspace,
  name: str,
  images: np.ndarray,
  rules: QuantRules,
  method: Method,
  *,
  key: jax.Array,
  description: str,
) -> QuantizedNetwork:
  """The student that a method of calibration makes with some images, before any correction.

  Args:
    workspace: where; its network is the float one.
    name: under which what is observed of the images is kept; the same for all methods and precisions.
    images: f32[n,h,w,c] in [0,1].
    rules: bits of every layer; their ranges are replaced by the method's.
    method: what is done.
    key: of the draws.
    description: what the images are called.
  """
  if method.equalizes:
    workspace, name = workspace._replace(network=equalized(workspace.network).network), f"{name}-equalized"
  network, rules = workspace.network, method.applied(rules)
  table = range_table(workspace, name, images, description=description)
  if rules.needs_histograms:
    histograms = histogram_table(workspace, f"{name}-histograms", images, table, description=description)
    ranges = histogram_ranges(histograms, rules.resolve(network), rules.ranges)
  else:
    ranges = ranges_from(table, rules, key=key, steps=method.steps, batch_size=method.batch_size)
  return quantize(network, rules, ranges)


@functools.lru_cache(maxsize=2)
def equalized(network: Network) -> Equalized:
  """The network with equalized scales; found once a process."""
  return equalize(network, criterion="weights")


def reconstructed(
  workspace: Workspace,
  student: QuantizedNetwork,
  images: np.ndarray,
  config: ReconstructConfig,
  *,
  reference: Network,
  key: jax.Array,
  name: str,
) -> tuple[QuantizedNetwork, tuple[UnitReport, ...]]:
  """The student whose units give what the float network's give, and what happened to each unit.

  Args:
    workspace: where; its network is the float one.
    student: calibrated.
    images: f32[n,h,w,c] in [0,1].
    config: how.
    reference: the float network that the student was made of.
    key: of everything random.
    name: of the folder that keeps finished units in `workspace.scratch`.
  """
  workspace.stop_if_asked()
  return reconstruct_with_report(
    student,
    images,
    config,
    key=key,
    reference=reference,
    workdir=None if workspace.scratch is None else workspace.scratch / name,
    devices=workspace.group,
    progress=workspace.progress,
    should_stop=workspace.should_stop,
  )


def fine_tuned(
  workspace: Workspace,
  student: QuantizedNetwork,
  images: np.ndarray,
  config: DistillConfig,
  *,
  key: jax.Array,
  teacher: Forwardable | None = None,
) -> QuantizedNetwork:
  """The student after distilling a teacher into it, by default the float network; checkpoints are in `workspace.scratch`."""
  workspace.stop_if_asked()
  workspace.log(f"fine-tuning {student.name}: {config.steps} steps")
  trained, history = distill_with_history(
    student,
    workspace.network if teacher is None else teacher,
    images,
    config.replace(checkpoint_every=workspace.checkpoint_steps),
    key=key,
    workdir=workspace.scratch,
    devices=workspace.group,
    progress=workspace.progress,
    callback=lambda step, metrics, _: event_log.log_distillation(workspace.events, config, [metrics]),
  )
  event_log.log_distillation(workspace.events, config, history)
  return trained
