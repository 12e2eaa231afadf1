"""Mean predictions and their evenness against values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kwjax.analysis.bias import class_mass, evenness, tail_share
from kwjax.errors import DataError


def test_mean_predictions_by_hand() -> None:
  # Softmax (3/4, 1/4), (1/2, 1/2), (1/4, 3/4), (1/4, 3/4); the second is a tie, which its first class wins.
  logits = np.log([[3.0, 1.0], [1.0, 1.0], [1.0, 3.0], [1.0, 3.0]])
  found = class_mass(logits)
  np.testing.assert_allclose(found.soft, [1.75 / 4, 2.25 / 4])
  np.testing.assert_allclose(found.hard, [0.5, 0.5])
  np.testing.assert_allclose(class_mass(logits + 1e4).soft, found.soft)


def test_evenness_by_hand() -> None:
  assert evenness(np.full(7, 1 / 7)) == pytest.approx(1)
  assert evenness([0, 1, 0]) == 0
  # Two of four classes alike: log 2 / log 4.
  assert evenness([0.5, 0.5, 0, 0]) == pytest.approx(0.5)
  assert evenness([0.75, 0.25]) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2))


def test_tail_is_the_least_predicted_tenth() -> None:
  assert tail_share(np.full(10, 0.1)) == pytest.approx(1)
  assert tail_share(np.arange(10) / 45) == 0
  # The two smallest of twenty hold 1/210 and 2/210, and would hold a tenth.
  assert tail_share(np.arange(20, 0, -1) / 210) == pytest.approx(0.3 / 2.1)
  # 0.1 * 30 is a little more than 3: three classes are the tail, not four.
  assert tail_share(np.arange(1, 31) / 465) == pytest.approx(10 * 6 / 465)
  assert tail_share([0.2, 0.3, 0.5], 0.5) == pytest.approx(1.5 * 0.5)


@pytest.mark.parametrize(
  "call",
  [
    lambda: class_mass(np.zeros((0, 3))),
    lambda: class_mass([[0.0, np.nan]]),
    lambda: evenness([1.0]),
    lambda: evenness([0.5, 0.4]),
    lambda: tail_share([1.5, -0.5]),
    lambda: tail_share([0.5, 0.5], 0.0),
  ],
)
def test_what_are_no_shares_is_refused(call) -> None:
  with pytest.raises(DataError):
    call()
