"""What the main job fine-tunes with: what was measured not to undo the calibration that came before."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest

from experiments._harness.options import Options, sizes
from experiments._harness.scoring import is_near
from experiments._harness.stages import distill_config
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
  config = distill_config(options, network, sizes(options, network), scheme, near=near)
  assert (config.batch_norm, config.learning_rate) == (batch_norm, rate)
  asked = dataclasses.replace(options, distill_learning_rate=0.5)
  assert distill_config(asked, network, sizes(asked, network), scheme, near=near).learning_rate == 0.5


@pytest.mark.parametrize(("kl", "near"), [(0.99, True), (1.0, False), (None, True)])
def test_one_nat_is_far(kl: float | None, near: bool) -> None:
  assert is_near({"held_out": None if kl is None else {"kl": kl}}) == near
