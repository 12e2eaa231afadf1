"""Ways to calibrate, by name: activation ranges, weight ranges, equalization before and correction of moments after."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from kwjax.quantization.rules import QuantRules

_MSE_BITS, _FLOAT_BITS = 3, 32


class Method(NamedTuple):
  """What a calibration does beside choosing bits.

  Attributes:
    ranges: of activations, see `kwjax.quantization.RANGE_METHODS`.
    weights_range: "minmax", "mse", or "by-bits": "mse" from 3 bits on. A grid of four values that leaves the largest
      weights out loses more than it gains: at 2w4a, moments corrected, ResNet-44 keeps 78.86 % with the whole range and 74.43 %
      with "mse".
    corrects_bias: whether the means of the channels are those of the float network again.
    equalizes: whether scales are moved between layers first, where that changes nothing.
    corrects_variance: whether BatchNorm's variances are those of the float network again; with `corrects_bias` only.
    steps: random batches of images that extremes are averaged over, as of `kwjax.calibrate`.
    batch_size: images in each of them.
  """

  ranges: str = "sample"
  weights_range: str = "minmax"
  corrects_bias: bool = False
  equalizes: bool = False
  corrects_variance: bool = False
  steps: int = 200
  batch_size: int = 256

  def range_of_weights(self, rules: QuantRules) -> str:
    """The weight range of some rules, "by-bits" decided: a name in `kwjax.quantization.WEIGHT_RANGES`."""
    if self.weights_range != "by-bits":
      return self.weights_range
    return "mse" if (rules.bits.weights or _FLOAT_BITS) >= _MSE_BITS else "minmax"

  def applied(self, rules: QuantRules) -> QuantRules:
    """Rules with this method's ranges."""
    return dataclasses.replace(rules, ranges=self.ranges, weights_range=self.range_of_weights(rules))

  def describe(self) -> str:
    """What it does beside what rules say, in a few words for a protocol; empty if nothing."""
    parts = ["scales equalized over layers"] if self.equalizes else []
    if self.corrects_bias:
      parts.append("mean and variance corrected" if self.corrects_variance else "bias corrected")
    return ", ".join(parts)


PAPER = Method()
"""Haroush et al. (2020): extremes of each sample, averaged."""


BEST = Method(weights_range="by-bits", corrects_bias=True, corrects_variance=True)
"""The best without data on ResNet-44 4w4a and 2w4a and EfficientNet-Lite0 4w8a (`experiments.calibration.table_calibration`)."""

METHODS: Mapping[str, Method] = {"best": BEST, "paper": PAPER}
"""Methods by name."""
