"""What the main job fine-tunes with: what was measured not to undo the calibration that came before."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest

from kwjax.analysis.scoring import Score, is_near
from kwjax.cli.options import Options, fine_tuning_of, sizes
from kwjax.runtime.evaluate import Agreement
from tests.networks import tiny_network


@pytest.mark.parametrize(
  ("preset", "scheme", "near", "batch_norm", "rate"),
  [
    ("cpu", "bns", True, "frozen", 1e-4),
    ("cpu", "bns", False, "train", 0.01),
    ("cpu", "gaussian", False, "frozen", 1e-3),
    ("cpu", "gaussian", True, "frozen", 1e-4),
    ("paper", "bns", False, "train", 0.1),
    ("paper", "gaussian", False, "frozen", 0.01),
  ],
)
def test_next_to_a_good_start_statistics_stay_and_the_rate_is_small(
  preset: Literal["cpu", "paper"], scheme: str, near: bool, batch_norm: str, rate: float
) -> None:
  options, network = Options(preset=preset), tiny_network()
  config = fine_tuning_of(options, sizes(options, network)).config(network, scheme, near=near)
  assert (config.batch_norm, config.learning_rate) == (batch_norm, rate)
  asked = dataclasses.replace(options, distill_learning_rate=0.5)
  assert fine_tuning_of(asked, sizes(asked, network)).config(network, scheme, near=near).learning_rate == 0.5


@pytest.mark.parametrize(("kl", "near"), [(0.99, True), (1.0, False), (None, True)])
def test_one_nat_is_far(kl: float | None, near: bool) -> None:
  assert is_near(Score(None, kl if kl is None else Agreement(0.5, kl, 10.0, 16), None)) == near
