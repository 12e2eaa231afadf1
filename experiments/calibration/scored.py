"""How good the quantized networks of the studies of calibration are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments._harness.distilled import float_score
from experiments._harness.image_sets import short_name
from experiments._harness.study_report import top1_results
from experiments._harness.tables import Results, Table
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


_NATS = "nats"


def tables(what: str, rows: Sequence[str], columns: Sequence[str], note: str) -> tuple[Table, Table]:
  """Top-1 of each row and column, and the KL from the float network on the same images."""
  note = f"{note} Evaluated on images that are used for nothing else."
  names = tuple(rows), tuple(columns)
  return (
    Table(f"{what}: top-1 (%)", *names, note=note),
    Table(f"{what}: KL from the float network", *names, unit=dict.fromkeys(columns, _NATS), note=note),
  )


def value_in(table: Table, column: str) -> str:
  """Which of the values of `scored` a table shows."""
  return "kl" if table.unit_of(column) == _NATS else "top1"


def protocol(evaluation: ImageData) -> dict[str, str]:
  """What holds for all cells of a study whose columns are image sets."""
  return {
    "data used": "column real: real images; the others: none, images come from the network itself",
    "evaluation images": f"{len(evaluation)} of {short_name(evaluation)}; used for nothing else",
  }


def report(workspace: Workspace, evaluation: ImageData, results: Mapping[str, Results], top1: Table) -> dict[str, Any]:
  """Keys of report.json beside the tables."""
  columns = {column: column for column in top1.columns}
  return {
    "float": float_score(workspace, evaluation),
    "calibrated": top1_results(top1, results[top1.title], columns),
  }
