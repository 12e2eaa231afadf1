"""What the main job's report points out by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from experiments.results import _notes


def score(kind: str, top1: float, count: int) -> dict[str, Any]:
  return {"accuracy": None, "held_out": None, kind: {"top1": top1, "count": count}}


@pytest.mark.parametrize(
  ("kind", "before", "after", "count", "said"),
  [
    ("accuracy", 0.9046, 0.8515, 1017, "Fine-tuning lowered the top-1 of 4w4a from 90.46% to 85.15%"),
    ("held_out", 0.9, 0.5, 128, "lowered the agreement on the held-out images of 4w4a from 90.00% to 50.00%"),
    ("accuracy", 0.9046, 0.8946, 1017, ""),  # within the intervals
    ("accuracy", 10 / 11, 6 / 11, 11, ""),  # eleven images say little
    ("accuracy", 0.8, 0.9, 1017, ""),
  ],
)
def test_a_fine_tuning_that_made_things_worse_is_said(
  kind: str, before: float, after: float, count: int, said: str
) -> None:
  job: Any = SimpleNamespace(options=SimpleNamespace(bits=("8w8a", "4w4a")), config=SimpleNamespace(scheme="bns"))
  scores = {"4w4a": {"bns": score(kind, before, count)}}
  notes = _notes(job, scores, score(kind, after, count))
  assert len(notes) == bool(said)
  assert said in "".join(notes)
  assert _notes(job, scores, None) == []
