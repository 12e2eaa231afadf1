"""Activation ranges from histograms: percentile, MSE and entropy. Each is a pure function of one histogram.

Every range is for the grid of `activation_grid`: 2^b unsigned levels over the range extended to include 0, with an integer
zero point.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np

from kwjax.quantization.histograms import Histogram, Histograms
from kwjax.quantization.ranges import Ranges
from kwjax.quantization.rules import LayerRule, histogram_method

_EDGE_CANDIDATES = 256
_PAIR_CANDIDATES = 28
_REFINED = 13
_ENTROPY_CANDIDATES = 128
_SMALLEST_SHARE = 1 / 16


def percentile_range(histogram: Histogram, percent: float = 99.99) -> tuple[float, float]:
  """The range that `percent` per cent of all values do not exceed at either end; exact within a bin.

  Args:
    histogram: of one layer.
    percent: above 50, at most 100; 100 gives the extremes.

  Returns:
    (lo, hi), in the unit of the values.
  """
  edges, below = histogram.edges, np.concatenate([[0], np.cumsum(histogram.counts)]).astype(np.float64)
  at_zero = np.interp(0.0, edges, below)
  place = np.searchsorted(edges, 0.0)
  # Values of exactly 0 make the distribution jump.
  values = np.insert(edges, place, [0.0, 0.0]) if histogram.zeros else edges
  jump = [at_zero, at_zero + histogram.zeros]
  reached = np.concatenate([below[:place], jump, below[place:] + histogram.zeros]) if histogram.zeros else below
  total = reached[-1]
  lo, hi = np.interp([total * (1 - percent / 100), total * percent / 100], reached, values)
  return float(lo), float(hi)


def quantization_error(histogram: Histogram, lo: np.ndarray | float, hi: np.ndarray | float, bits: int) -> np.ndarray:
  """Sum over all values of (x - Q(x))^2 for activation grids of given ranges; a value counts as the middle of its bin.

  Args:
    histogram: of a single layer.
    lo: f64[...], lowest ends.
    hi: f64[...], highest ends.
    bits: 2 to 8.

  Returns:
    f64[...], in squared units of the values.
  """
  values, counts = _occupied(histogram)
  scale, zero, top = _grid(np.asarray(lo)[..., None], np.asarray(hi)[..., None], bits)
  level = np.clip(np.round(values / scale + zero), 0, top)
  return np.square(values - (level - zero) * scale) @ counts


def mse_range(histogram: Histogram, bits: int) -> tuple[float, float]:
  r"""The range with the least squared error of rounding and clipping, $\min_{lo, hi} \sum_x (x - Q(x))^2$.

  If all values are on one side of 0, one end is searched in 256 steps; else both, in a coarse and a fine mesh.

  Args:
    histogram: of a single layer.
    bits: of the activations, 2 to 8; the fewer, the more is clipped.

  Returns:
    (lo, hi), in the unit of the values.

  Source: Sung, Shin & Hwang (2015), arXiv:1511.06488, L2 error minimization; Banner et al. (2019), arXiv:1810.05723.
  """
  lo, hi = min(float(histogram.lo), 0.0), max(float(histogram.hi), 0.0)
  if lo == 0.0 or hi == 0.0:
    shares = np.arange(1, _EDGE_CANDIDATES + 1) / _EDGE_CANDIDATES
    best = shares[int(np.argmin(quantization_error(histogram, lo * shares, hi * shares, bits)))]
    return lo * best, hi * best
  shares = np.arange(1, _PAIR_CANDIDATES + 1) / _PAIR_CANDIDATES
  low, high = _best_pair(histogram, lo, hi, shares, shares, bits)
  near = np.linspace(-1, 1, _REFINED) / _PAIR_CANDIDATES
  low, high = _best_pair(histogram, lo, hi, np.clip(low + near, 0, 1), np.clip(high + near, 0, 1), bits)
  return lo * low, hi * high


def _best_pair(
  histogram: Histogram, lo: float, hi: float, lows: np.ndarray, highs: np.ndarray, bits: int
) -> tuple[float, float]:
  errors = np.stack([quantization_error(histogram, np.full(len(highs), lo * low), hi * highs, bits) for low in lows])
  row, column = np.unravel_index(int(np.argmin(errors)), (len(lows), len(highs)))
  return float(lows[row]), float(highs[column])


def entropy_range(histogram: Histogram, bits: int) -> tuple[float, float]:
  """The range with the least KL(clipped distribution || quantized distribution).

  Both ends shrink together, in 128 steps down to a sixteenth. Values of exactly 0 do not count: every grid keeps them.

  Args:
    histogram: of a single layer.
    bits: of the activations, 2 to 8.

  Returns:
    (lo, hi), in the unit of the values.

  Source: Migacz (2017), "8-bit Inference with TensorRT", GTC.
  """
  lo, hi = min(float(histogram.lo), 0.0), max(float(histogram.hi), 0.0)
  shares = np.linspace(_SMALLEST_SHARE, 1, _ENTROPY_CANDIDATES)
  divergences = [quantized_divergence(histogram, lo * share, hi * share, bits) for share in shares]
  share = float(shares[int(np.argmin(divergences))])
  return lo * share, hi * share


def quantized_divergence(histogram: Histogram, lo: float, hi: float, bits: int) -> float:
  """KL(P || Q) in nats, over the bins inside a range.

  P: their counts, with the values outside added to the outermost bins. Q: their counts, spread evenly over the non-empty bins
  of each level. Infinite if no value is inside.
  """
  values, counts = _occupied(histogram)
  inside = (values >= lo) & (values <= hi)
  if not inside.any():
    return float("inf")
  scale, zero, top = _grid(np.asarray(lo), np.asarray(hi), bits)
  level = np.clip(np.round(values[inside] / scale + zero), 0, top).astype(int)
  p, q = counts[inside].copy(), counts[inside]
  p[0] += counts[values < lo].sum()
  p[-1] += counts[values > hi].sum()
  spread = np.bincount(level, q, top + 1) / np.maximum(np.bincount(level, minlength=top + 1), 1)
  q = spread[level]
  p, q = p / p.sum(), q / q.sum()
  return float(np.sum(p * np.log(p / q)))


def histogram_ranges(histograms: Histograms, rules: Mapping[str, LayerRule], method: str) -> Ranges:
  """The range of every layer's input by one method.

  Args:
    histograms: `{layer: Histogram}`.
    rules: of `QuantRules.resolve`, the bits of each layer; a layer with float activations gets its extremes.
    method: "percentile", "percentile:99.9", "mse" or "entropy".

  Returns:
    Ranges, f32[] for each layer, f32[repeats] for stacked ones.

  Raises:
    RuleError: the method is unknown, or does not use histograms.
  """
  kind, percent = histogram_method(method)
  by_bits: dict[str, Callable[[Histogram, int], tuple[float, float]]] = {
    "percentile": lambda histogram, bits: percentile_range(histogram, percent),
    "mse": mse_range,
    "entropy": entropy_range,
  }
  found = {}
  for name, histogram in histograms.items():
    bits, shape = rules[name].activation_bits, np.shape(histogram.lo)
    singles = [histogram.single(index) for index in itertools.product(*map(range, shape))]
    if bits is None:
      ends = [(float(single.lo), float(single.hi)) for single in singles]
    else:
      ends = [by_bits[kind](single, bits) for single in singles]
    lo, hi = np.asarray(ends).T.reshape(2, *shape)
    found[name] = (lo, hi)
  return Ranges(found)


def _occupied(histogram: Histogram) -> tuple[np.ndarray, np.ndarray]:
  occupied = histogram.counts > 0
  return histogram.centres[occupied], histogram.counts[occupied].astype(np.float64)


def _grid(lo: np.ndarray, hi: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, int]:
  """Scale, zero point and highest level of `activation_grid`, for arrays of ranges, in float64."""
  top = 2**bits - 1
  lo, hi = np.minimum(lo, 0.0), np.maximum(hi, 0.0)
  scale = np.where(hi > lo, (hi - lo) / top, 1.0)
  return scale, np.round(-lo / scale), top
