"""AUROC against its definition, its interval by coverage, and the softmax score in float64."""

from __future__ import annotations

import numpy as np
import pytest

from kwjax.analysis.roc import auroc, auroc_interval, max_softmax
from kwjax.errors import DataError


@pytest.mark.parametrize("levels", [3, 10, 10_000])
def test_auroc_is_its_definition_with_ties(levels: int) -> None:
  rng = np.random.default_rng(levels)
  inside, outside = rng.integers(0, levels, 37) / levels, rng.integers(levels // 3, levels + 2, 53) / levels
  pairs = [(x < y) + 0.5 * (x == y) for x in inside for y in outside]
  assert auroc(inside, outside) == pytest.approx(np.mean(pairs), abs=1e-15)
  assert auroc(outside, inside) == pytest.approx(1 - np.mean(pairs), abs=1e-15)


def test_auroc_at_the_ends() -> None:
  assert auroc([1, 2], [3.0, np.inf]) == 1.0
  assert auroc([3], [1, 2]) == 0.0
  assert auroc([1, 1], [1]) == 0.5


@pytest.mark.parametrize("bad", [[], [1.0, np.nan]])
def test_scores_that_have_no_order_are_refused(bad: list[float]) -> None:
  with pytest.raises(DataError, match="scores_out needs at least one score and no NaN"):
    auroc([1.0], bad)


@pytest.mark.parametrize("rate", [1.0, 0.2, 0.03])
def test_the_interval_covers_the_true_area(rate: float) -> None:
  rng, hits = np.random.default_rng(1), 0
  for _ in range(400):
    # P(X < Y) = 1 / (1 + rate) for exponential X of rate 1 and Y of this rate.
    area = auroc(rng.exponential(1.0, 40), rng.exponential(1.0 / rate, 60))
    low, high = auroc_interval(area, 40, 60)
    assert 0 <= low <= area <= high <= 1
    hits += low <= 1 / (1 + rate) <= high
  assert 0.92 <= hits / 400 <= 0.985


def test_the_edges_solve_the_equation() -> None:
  m, n, area = 100, 50, 0.9
  for theta in auroc_interval(area, m, n):
    # Hanley and McNeil's own form, both counts replaced by their mean.
    q1, q2, more = theta / (2 - theta), 2 * theta**2 / (1 + theta), (m + n) / 2 - 1
    variance = (theta * (1 - theta) + more * (q1 - theta**2) + more * (q2 - theta**2)) / (m * n)
    assert abs(area - theta) == pytest.approx(1.959964 * np.sqrt(variance), rel=1e-5)


def test_a_perfect_area_is_not_certain() -> None:
  low, high = auroc_interval(1.0, 20, 20)
  assert high == 1.0
  assert 0.8 < low < 0.95
  with pytest.raises(DataError, match="no interval"):
    auroc_interval(1.1, 20, 20)


def test_max_softmax_is_exact_for_sure_images() -> None:
  logits = np.array([[0.0, 1.0, 2.0], [60.0, 0.0, 0.0], [50.0, 0.0, 0.0], [4.0, 4.0, 4.0]])
  odds = np.exp(logits - logits.max(1, keepdims=True))
  found = np.asarray(max_softmax(logits))
  others = odds.sum(1) - 1.0  # the largest counts 1
  np.testing.assert_allclose(found[[0, 3]], (others / odds.sum(1))[[0, 3]], rtol=1e-6)
  np.testing.assert_allclose(found[1:3], [2 * np.exp(-60), 2 * np.exp(-50)], rtol=1e-4)
