"""Detection of foreign and adversarial images: a cell of a table of areas under ROC curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments._harness.study import CellPlan, Missing
from experiments.knowledge_within.similarity_sets import (
  DIVERGENCE,
  FITTED,
  FITTED_BNS,
  GROUP,
  GROUPS,
  SOFTMAX,
  TRAIN,
  Subject,
)
from kwjax.analysis.roc import auroc, auroc_interval
from kwjax.compression.workspace import Workspace

_DESCRIPTIONS = {
  DIVERGENCE: "mean divergence of a single image over the deepest third of the layers",
  FITTED: "distance of its divergences from those of the training images",
  FITTED_BNS: "distance of its divergences from those of",
  GROUPS: f"J_KL of disjoint groups of {GROUP}",
  SOFTMAX: "1 - the largest softmax",
}


def detection_cell(subject: Subject, row: str, kind: str) -> CellPlan | None:
  """How well one score tells a network's own images from those of another set: the area under the ROC curve.

  Args:
    subject: the network.
    row: name of the other set; the cell stays empty for the network's own, and for `fitted` on what it was fitted on.
    kind: one of `SCORES`.

  Raises:
    Missing: a set or the score needs what was not given.
  """
  if row == subject.own or (row == TRAIN and kind == FITTED):
    # A reference is at home with the images that it was fitted on.
    return None
  inside, outside = subject.images(subject.own), subject.images(row)
  if kind == GROUPS and min(inside.size, outside.size) < GROUP:
    raise Missing(f"{GROUPS} needs at least {GROUP} images of each set: --images {GROUP} or more")
  settings = {**subject.settings(subject.own, row), "score": kind, "reference": subject.score_settings(kind)}
  description = f"{_DESCRIPTIONS[kind]} {subject.made.description}" if kind == FITTED_BNS else _DESCRIPTIONS[kind]

  def compute(workspace: Workspace, seed: int) -> Mapping[str, Any]:
    own, other = (subject.scores(workspace, kind, name, seed) for name in (subject.own, row))
    area = auroc(own, other)
    interval = auroc_interval(area, len(own), len(other))
    return {"value": area, "interval": list(interval), "counts": [len(own), len(other)]}

  return CellPlan(
    settings,
    f"{description}; {inside.description} against {outside.description}",
    compute,
    seeded=any(subject.is_seeded(kind, name) for name in (subject.own, row)),
  )
