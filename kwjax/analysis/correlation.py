"""Whether two quantities rank things alike."""

from __future__ import annotations

from typing import Any

import numpy as np


def rank_correlation(x: Any, y: Any) -> float | None:
  """Spearman's rank correlation: the correlation of the ranks, equal values sharing the mean of theirs.

  rho = sum_i (r_i - r)(s_i - s) / sqrt(sum_i (r_i - r)^2 sum_i (s_i - s)^2), r_i and s_i the ranks of x_i and y_i.

  Args:
    x: [n], finite.
    y: [n], finite.

  Returns:
    A number in [-1, 1]; None for fewer than three pairs, or where all values of one are equal.

  Raises:
    ValueError: the lengths differ.
  """
  values = np.stack([np.asarray(x, float).reshape(-1), np.asarray(y, float).reshape(-1)])
  if values.shape[1] < 3 or (np.ptp(values, axis=1) == 0).any():
    return None
  from scipy import stats

  return float(stats.spearmanr(*values).statistic)
