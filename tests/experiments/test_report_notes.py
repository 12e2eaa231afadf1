"""What the main job's report points out by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from experiments._harness.results import _notes
from experiments._harness.scoring import is_closer


def score(kind: str, top1: float, count: int) -> dict[str, Any]:
  return {"accuracy": None, "held_out": None, kind: {"top1": top1, "count": count, "kl": 1.0 - top1}}


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
  assert len(notes) == bool(said) + (kind == "held_out")
  assert said in "".join(notes)
  assert _notes(job, scores, None) == []


def test_what_fine_tuning_brings_no_closer_is_not_kept() -> None:
  job: Any = SimpleNamespace(options=SimpleNamespace(bits=("4w4a",)), config=SimpleNamespace(scheme="bns"))
  near, far = score("held_out", 0.9, 16), score("held_out", 0.89, 16)
  assert is_closer(near, far)
  assert not is_closer(far, near)
  assert not is_closer(near, near)
  assert is_closer(score("accuracy", 0.1, 16), score("accuracy", 0.9, 16)), "labels are for the report alone"
  (note,) = _notes(job, {"4w4a": {"bns": near}}, far)
  assert note == (
    "The calibrated 4w4a is the one that is saved: fine-tuning took its KL from the float network on the held-out images "
    "from 0.1 to 0.11 nats."
  )
  assert _notes(job, {"4w4a": {"bns": far}}, near) == []
