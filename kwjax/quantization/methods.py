"""Ways to calibrate, by name: activation ranges, weight ranges, equalization before and correction of moments after."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

from kwjax.quantization.rules import QuantRules

_MSE_BITS, _ENOUGH_BITS, _FLOAT_BITS = 3, 8, 32

Correction = Literal["none", "means", "moments"]
"""What is brought back to the float network's: nothing, the channels' means, or BatchNorm's variances as well."""


class Method(NamedTuple):
  """What a calibration does beside choosing bits.

  Attributes:
    ranges: of activations, a name in `kwjax.quantization.RANGE_METHODS`, or "by-bits": "mse" below 8 bits, else "sample". At
      4w4a, moments corrected, EfficientNet-Lite0 has a KL of 0.43 nats from the float network with "mse" and of 0.56 with
      "sample"; with 8 bits in its 1x1 layers MobileNetV2 has 1.46 and 3.00.
    weights_range: "minmax", "mse", or "by-grid": "mse", but the whole range for "symfull" below 3 bits. Of its four levels one
      alone is positive: at 2w4a, moments corrected, ResNet-44 keeps 78.86 % with the whole range and 74.43 % with "mse".
    corrects_bias: whether the means of the channels are those of the float network again.
    equalizes: whether scales are moved between layers first, where that changes nothing.
    corrects_variance: whether BatchNorm's variances are those of the float network again; with `corrects_bias` only.
    chooses: whether fewer corrections are made where held-out images say that this helps the network at these bits.
    steps: random batches of images that extremes are averaged over, as of `kwjax.calibrate`.
    batch_size: images in each of them.
  """

  ranges: str = "sample"
  weights_range: str = "minmax"
  corrects_bias: bool = False
  equalizes: bool = False
  corrects_variance: bool = False
  chooses: bool = False
  steps: int = 200
  batch_size: int = 256

  def range_of_weights(self, rules: QuantRules) -> str:
    """The weight range of some rules, "by-grid" decided: a name in `kwjax.quantization.WEIGHT_RANGES`."""
    if self.weights_range != "by-grid":
      return self.weights_range
    bits = rules.bits.weights or _FLOAT_BITS
    return "minmax" if bits < _MSE_BITS and rules.weight_scheme(bits) == "symfull" else "mse"

  def range_of_activations(self, rules: QuantRules) -> str:
    """The activation range of some rules, "by-bits" decided: a name in `kwjax.quantization.RANGE_METHODS`."""
    if self.ranges != "by-bits":
      return self.ranges
    return "mse" if (rules.bits.activations or _FLOAT_BITS) < _ENOUGH_BITS else "sample"

  def corrections(self) -> tuple[Correction, ...]:
    """The corrections that are tried, the one without a choice last."""
    found: list[Correction] = ["none"]
    if self.corrects_bias:
      found += ["means", "moments"] if self.corrects_variance else ["means"]
    return tuple(found) if self.chooses else (found[-1],)

  def applied(self, rules: QuantRules) -> QuantRules:
    """Rules with this method's ranges."""
    return dataclasses.replace(
      rules, ranges=self.range_of_activations(rules), weights_range=self.range_of_weights(rules)
    )

  def describe(self) -> str:
    """What it does beside what rules say, in a few words for a protocol; empty if nothing."""
    parts = ["scales equalized over layers"] if self.equalizes else []
    if self.corrects_bias:
      what = "mean and variance corrected" if self.corrects_variance else "bias corrected"
      parts.append(f"{what} unless held-out images speak against it" if self.chooses else what)
    return ", ".join(parts)


PAPER = Method()
"""Haroush et al. (2020): extremes of each sample, averaged."""


BEST = Method("by-bits", weights_range="by-grid", corrects_bias=True, corrects_variance=True, chooses=True)
"""The best without data on ResNet-44 4w4a and 2w4a and EfficientNet-Lite0 4w8a (`experiments.calibration.table_calibration`).
The corrected moments that gain there cost MobileNetV2 four points at 8 bits, so each network chooses."""

METHODS: Mapping[str, Method] = {"best": BEST, "paper": PAPER}
"""Methods by name."""
