"""What the main job's report points out by itself."""

from __future__ import annotations

import pytest

from kwjax.analysis.scoring import Score, is_closer
from kwjax.cli.compress_report import notes_of
from kwjax.runtime.evaluate import Accuracy, Agreement


def score(kind: str, top1: float, count: int) -> Score:
  if kind == "accuracy":
    return Score(Accuracy(top1, None, count), None, None)
  return Score(None, Agreement(top1, 1.0 - top1, 10.0, count), None)


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
  notes = notes_of("4w4a", score(kind, before, count), score(kind, after, count))
  assert len(notes) == bool(said) + (kind == "held_out")
  assert said in "".join(notes)
  assert notes_of("4w4a", score(kind, before, count), None) == []


def test_what_fine_tuning_brings_no_closer_is_not_kept() -> None:
  near, far = score("held_out", 0.9, 16), score("held_out", 0.89, 16)
  assert is_closer(near, far)
  assert not is_closer(far, near)
  assert not is_closer(near, near)
  assert is_closer(score("accuracy", 0.1, 16), score("accuracy", 0.9, 16)), "labels are for the report alone"
  (note,) = notes_of("4w4a", near, far)
  assert note == (
    "The calibrated 4w4a is the one that is saved: fine-tuning took its KL from the float network on the held-out images "
    "from 0.1 to 0.11 nats."
  )
  assert notes_of("4w4a", far, near) == []
