"""How good the quantized networks of the studies of calibration are."""

from __future__ import annotations

import dataclasses

import numpy as np

from kwjax.compression.settings import Sizes
from kwjax.compression.workspace import Workspace
from kwjax.network import Network
from kwjax.quantization import QuantizedNetwork
from kwjax.quantization.methods import PAPER, Method
from kwjax.runtime.data import ImageData
from kwjax.runtime.evaluate import predict, score_logits

NO_PART = ("steps", "batch_size", "chooses")
"""Fields of a method that are no part of a way to calibrate: studies record the draws by themselves, and never choose."""


def with_draws(method: Method, chosen: Sizes) -> Method:
  """A method with the numbers of draws of a preset."""
  return method._replace(steps=chosen.calibration_steps, batch_size=chosen.calibration_batch)


def scored(
  workspace: Workspace, student: QuantizedNetwork, evaluation: ImageData, float_logits: dict[str, np.ndarray]
) -> dict[str, float]:
  """`{"top1": fraction, "kl": nats}` on labelled images; the float network's logits are made once and kept."""

  def logits(network: Network | QuantizedNetwork) -> np.ndarray:
    workspace.stop_if_asked()
    return predict(
      network,
      evaluation,
      batch_size=workspace.batch_size,
      devices=workspace.group,
      should_stop=workspace.should_stop,
    )

  if "float" not in float_logits:
    float_logits["float"] = logits(workspace.network)
  # Ranges do not depend on how they were found any more, and students of equal rules are compiled once.
  student = dataclasses.replace(student, rules=dataclasses.replace(student.rules, ranges=PAPER.ranges))
  score = score_logits(logits(student), len(evaluation), evaluation.labels, float_logits["float"])
  assert score.accuracy is not None
  assert score.agreement is not None
  return {"top1": score.accuracy.top1, "kl": score.agreement.kl}
