"""How a copy is calibrated: activation ranges, weight ranges, equalization before and bias correction after, by name."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments._harness import stages
from experiments._harness.common import say
from experiments._harness.options import Options, Sizes
from experiments._harness.stages import Site
from kwjax.network import Network
from kwjax.quantization import QuantizedNetwork, QuantRules, histogram_ranges, quantize, ranges_from
from kwjax.quantization.bias_correction import correct_bias
from kwjax.quantization.equalization import Equalized, equalize
from kwjax.runtime.data import ImageData
from kwjax.runtime.evaluate import predict, score_logits

_MSE_BITS, _FLOAT_BITS = 3, 32


class Method(NamedTuple):
  """What is done beside choosing bits.

  Attributes:
    ranges: of activations, see `kwjax.quantization.RANGE_READINGS`.
    weights_range: "minmax", "mse", or "by-bits": "mse" from 3 bits on. A grid of four values that leaves the largest
      weights out loses more than it gains: at 2w4a, moments corrected, ResNet-44 keeps 78.86 % with the whole range and 74.43 %
      with "mse".
    corrects_bias: whether the means of the channels are those of the float network again.
    equalizes: whether scales are moved between layers first, where that changes nothing.
    corrects_variance: whether BatchNorm's variances are those of the float network again; with `corrects_bias` only.
  """

  ranges: str = "sample"
  weights_range: str = "minmax"
  corrects_bias: bool = False
  equalizes: bool = False
  corrects_variance: bool = False

  def applied(self, rules: QuantRules) -> QuantRules:
    """Rules with these ranges."""
    weights_range = self.weights_range
    if weights_range == "by-bits":
      weights_range = "mse" if (rules.bits.weights or _FLOAT_BITS) >= _MSE_BITS else "minmax"
    return dataclasses.replace(rules, ranges=self.ranges, weights_range=weights_range)

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


def calibration_of(options: Options) -> str:
  """--calibration, by default the paper's under --preset paper, else the best."""
  return options.calibration or ("paper" if options.preset == "paper" else "best")


def weight_reading_of(options: Options) -> str:
  """--weight-reading, by default the paper's where its calibration is taken, else one that integer kernels can run."""
  return options.weight_reading or ("auto" if calibration_of(options) == "paper" else "integer")


def method_of(options: Options) -> Method:
  """What --calibration says, with the options that were given put in its place."""
  given: dict[str, Any] = {
    "ranges": options.range_reading,
    "weights_range": options.weight_range,
    "corrects_bias": None if options.correction is None else options.correction != "none",
    "corrects_variance": None if options.correction is None else options.correction == "moments",
    "equalizes": options.equalize,
  }
  base = {"paper": PAPER, "best": BEST}[calibration_of(options)]
  return base._replace(**{name: value for name, value in given.items() if value is not None})


def calibrated_copy(
  site: Site,
  stage: str,
  images: np.ndarray,
  rules: QuantRules,
  method: Method,
  chosen: Sizes,
  *,
  key: jax.Array,
  words: str,
) -> QuantizedNetwork:
  """The low-precision copy that a method makes with some images.

  Args:
    site: where; its network is the float one.
    stage: name under which what is observed of the images is kept; the same for all methods and precisions.
    images: f32[n,h,w,c] in [0,1].
    rules: bits of every layer; their ranges are replaced by the method's.
    method: what is done.
    chosen: its `calibration_steps` and `calibration_batch`.
    key: of the draws.
    words: what the images are called.
  """
  if method.equalizes:
    site, stage = site._replace(network=equalized(site.network).network), f"{stage}-equalized"
  network, rules = site.network, method.applied(rules)
  table = stages.range_table(site, stage, images, words=words)
  if rules.needs_histograms:
    histograms = stages.histogram_table(site, f"{stage}-histograms", images, table, words=words)
    ranges = histogram_ranges(histograms, rules.resolve(network), rules.ranges)
  else:
    steps, batch_size = chosen.calibration_steps, chosen.calibration_batch
    ranges = ranges_from(table, rules, key=key, steps=steps, batch_size=batch_size)
  copy = quantize(network, rules, ranges)
  if not method.corrects_bias:
    return copy
  site.shutdown_point()
  size = 128 if network.image_shape[0] <= 64 else 32
  # On one device: a mean over several is rounded otherwise, and a run must end alike wherever it goes on.
  return correct_bias(copy, images, variance=method.corrects_variance, batch_size=size, devices=1)


def scored(
  site: Site, copy: QuantizedNetwork, evaluation: ImageData, float_logits: dict[str, np.ndarray]
) -> dict[str, float]:
  """`{"top1": fraction, "kl": nats}` of a copy on labelled images; the float network's answers are made once, and kept there."""

  def answers(network: Network | QuantizedNetwork) -> np.ndarray:
    site.shutdown_point()
    size = 256 if site.network.image_shape[0] <= 64 else 32
    return predict(network, evaluation, batch_size=size, devices=site.group, should_stop=site.should_stop)

  if "float" not in float_logits:
    float_logits["float"] = answers(site.network)
  # Ranges do not depend on how they were found any more, and copies of equal rules are compiled once.
  copy = dataclasses.replace(copy, rules=dataclasses.replace(copy.rules, ranges=PAPER.ranges))
  score = score_logits(answers(copy), len(evaluation), evaluation.labels, float_logits["float"])
  assert score.accuracy is not None
  assert score.agreement is not None
  return {"top1": score.accuracy.top1, "kl": score.agreement.kl}


@functools.lru_cache(maxsize=2)
def equalized(network: Network) -> Equalized:
  """The network with equalized scales; found once a process, and what was left alone is said."""
  found = equalize(network, criterion="weights")
  say(f"equalized {len(found.pairs)} pairs of layers, {len(found.unsupported)} neighbours cannot be")
  return found
