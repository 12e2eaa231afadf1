"""How well a score tells two sets of images apart: the area under the ROC curve, and the usual score to compare with."""

from __future__ import annotations

import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.errors import DataError


def auroc(scores_in: Any, scores_out: Any) -> float:
  r"""Area under the ROC curve of a score that should be higher for the images of `scores_out`.

  $A = \frac1{mn} \sum_{ij} [x_i < y_j] + \frac12 [x_i = y_j]$: the chance that an outside image scores higher than an inside
  one, the Mann-Whitney statistic; exact, in O((m + n) log m).

  Args:
    scores_in: [m] numbers, of images that are like the training data.
    scores_out: [n] numbers, of foreign, noisy or adversarial images.

  Returns:
    In [0, 1]; 1/2 is chance, 1 perfect.

  Raises:
    DataError: a set is empty or holds NaN.
  """
  inside, outside = (np.ravel(np.asarray(scores, np.float64)) for scores in (scores_in, scores_out))
  for name, scores in (("scores_in", inside), ("scores_out", outside)):
    if not scores.size or np.isnan(scores).any():
      raise DataError(f"{name} needs at least one score and no NaN, found {scores.size}, {np.isnan(scores).sum()} NaN")
  from scipy import stats

  m, n = inside.size, outside.size
  ranks = stats.rankdata(np.concatenate([outside, inside]))[:n]
  return float((ranks.sum() - n * (n + 1) / 2) / (m * n))


def auroc_interval(area: float, count_in: int, count_out: int, confidence: float = 0.95) -> tuple[float, float]:
  r"""Confidence interval of an area under the ROC curve; right also near 1, where A +- z s is too narrow or beyond 1.

  All areas $\theta$ with $|A - \theta| \le z \sqrt{V(\theta)}$, where V is the variance of Hanley and McNeil at $\theta$:
  $V(\theta) = \frac{\theta (1-\theta)}{mn} (1 + (N-1) (\frac{1-\theta}{2-\theta} + \frac{\theta}{1+\theta}))$, $N = (m+n)/2$.

  Args:
    area: of `auroc`.
    count_in: m, scores of inside images.
    count_out: n, scores of outside images.
    confidence: two-sided coverage, in (0, 1).

  Returns:
    (low, high), in [0, 1].

  Raises:
    DataError: an argument is out of range.

  Source: Newcombe (2006), "Confidence intervals for an effect size measure based on the Mann-Whitney statistic", part 2,
  method 5; Hanley and McNeil (1982) for the variance.
  """
  if not (0 <= area <= 1 and count_in >= 1 and count_out >= 1 and 0 < confidence < 1):
    raise DataError(f"no interval for area {area} of {count_in} and {count_out} scores at confidence {confidence}")
  z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
  mean_count = (count_in + count_out) / 2

  def excess(theta: float) -> float:
    spread = 1 + (mean_count - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
    return abs(area - theta) - z * math.sqrt(theta * (1 - theta) * spread / (count_in * count_out))

  from scipy import optimize

  # V is 0 at both ends, so that an area of 0 or 1 is a root itself: the search starts a little beside it.
  low = 0.0 if area == 0 else optimize.brentq(excess, 0.0, area - 1e-12 * area)
  high = 1.0 if area == 1 else optimize.brentq(excess, area + 1e-12 * (1 - area), 1.0)
  return low, high


def max_softmax(logits: Any) -> jax.Array:
  """1 - max_k softmax(logits)_k, computed without the cancellation that makes it 0 for all sure images; pure.

  The usual score to compare detectors with: the higher, the less the network is sure of an image.

  Args:
    logits: f32[..., k].

  Returns:
    f32[...] in [0, 1 - 1/k].

  Source: Hendrycks and Gimpel (2017), "A baseline for detecting misclassified and out-of-distribution examples".
  """
  logits = jnp.asarray(logits, jnp.float32)
  odds = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  others = jnp.where(jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1], dtype=bool), 0.0, odds).sum(-1)
  return others / (1.0 + others)
