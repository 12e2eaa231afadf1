"""Bits of each layer: parsed from `4w4a`, resolved by layer path in execution order."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kwjax import intercept
from kwjax.batchnorm import matches
from kwjax.errors import RuleError
from kwjax.network import Network
from kwjax.quantization.grids import WEIGHT_SCHEMES

AUTO, INTEGER = "auto", "integer"
RANGE_METHODS = ("sample", "chunk", "percentile", "mse", "entropy")
"""Methods for activation ranges.

sample: lowest and highest value of each sample, averaged. chunk: those of each chunk of samples, averaged. The others use the
distribution over all images. percentile: the range of 99.99 % of the values ("percentile:99.9" for another share). mse: the
least squared error at the layer's bits. entropy: the least KL at the layer's bits."""
WEIGHT_RANGES = ("minmax", "mse")
"""minmax: the grid covers all weights of a channel. mse: it is clipped for the least squared error."""
_EXTREMES = ("sample", "chunk")
_PERCENT = 99.99

_FORM = 'expected WEIGHT_BITSwACTIVATION_BITSa with 2 to 8 bits, or 32 for none, such as "4w4a" or "4w32a", or "float"'


def histogram_method(text: str) -> tuple[str, float]:
  """Name and percentage of a range method that needs histograms: "percentile:99.9" is ("percentile", 99.9).

  Raises:
    RuleError: it is another method.
  """
  method, separator, number = text.partition(":") if isinstance(text, str) else ("", "", "")
  if method not in RANGE_METHODS or method in _EXTREMES or (separator and method != "percentile"):
    raise RuleError(f"unknown range method {text!r}, known are {', '.join(RANGE_METHODS)}")
  try:
    percent = float(number) if separator else _PERCENT
  except ValueError:
    percent = 0.0
  if not 50 < percent <= 100:
    raise RuleError(f"range method {text!r} needs a percentage above 50 and up to 100, such as percentile:99.9")
  return method, percent


class Bits(NamedTuple):
  """Bits of weights and of activations; None means float."""

  weights: int | None
  activations: int | None

  @classmethod
  def parse(cls, text: str) -> Bits:
    """Parse "4w8a" (32 means float) or "float".

    Raises:
      RuleError: the text has another form, or bits are not 2 to 8.
    """
    if text == "float":
      return cls(None, None)
    match = re.fullmatch(r"([0-9]{1,3})w([0-9]{1,3})a", text) if isinstance(text, str) else None
    if match is None:
      raise RuleError(f"cannot read bits {text!r}: {_FORM}")
    weights, activations = (int(group) for group in match.groups())
    if any(bits != 32 and not 2 <= bits <= 8 for bits in (weights, activations)):
      raise RuleError(f"bits {text!r} are out of range: {_FORM}")
    return cls(*(None if bits == 32 else bits for bits in (weights, activations)))

  def __str__(self) -> str:
    return "float" if self == (None, None) else f"{self.weights or 32}w{self.activations or 32}a"


@dataclasses.dataclass(frozen=True)
class LayerRule:
  """Rule of one layer: bits of its kernel and of its input (None: float), and its weight scheme."""

  weight_bits: int | None
  activation_bits: int | None
  weight_scheme: str | None


@dataclasses.dataclass(frozen=True)
class QuantRules:
  """Bits of every layer. Invariant: the first override that matches wins, then first/last, then the default.

  Attributes:
    bits: the default.
    first_last: bits of the first convolution and of the last layer in execution order, or None: the default.
    overrides: pairs of a pattern and bits. A pattern is a layer path, a regular expression that matches a whole path,
      "1x1", "first" or "last".
    weights: weight scheme, a name in `WEIGHT_SCHEMES`; or "auto": affine from 4 bits, symfull at 2 and 3; or "integer":
      affine0 from 4 bits, midrise at 2 and 3, which both have an integer form.
    ranges: range method, a name in `RANGE_METHODS`.
    weights_range: "minmax" or "mse", see `WEIGHT_RANGES`.
  """

  bits: Bits
  first_last: Bits | None = None
  overrides: tuple[tuple[str, Bits], ...] = ()
  weights: str = AUTO
  ranges: str = "sample"
  weights_range: str = "minmax"

  def __post_init__(self) -> None:
    for kind, value, known in (
      ("weight scheme", self.weights, (AUTO, INTEGER, *WEIGHT_SCHEMES)),
      ("weight range", self.weights_range, WEIGHT_RANGES),
    ):
      if value not in known:
        raise RuleError(f"unknown {kind} {value!r}, known are {', '.join(known)}")
    if self.ranges not in _EXTREMES:
      histogram_method(self.ranges)
    for pattern, _ in self.overrides:
      try:
        re.compile(pattern)
      except (re.error, TypeError) as error:
        raise RuleError(f"override {pattern!r} is not a regular expression: {error}") from error

  @classmethod
  def parse(
    cls,
    bits: str,
    *,
    first_last: str | None = None,
    overrides: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    weights: str = AUTO,
    ranges: str = "sample",
    weights_range: str = "minmax",
  ) -> QuantRules:
    """Parse rules: `parse("4w4a", first_last="8w8a", overrides={"layer3_.*": "8w8a", "1x1": "8w8a"})`.

    Args:
      bits: "4w4a" means 4-bit weights and 4-bit activations; 2 to 8 bits, 32 for float, or "float" for both.
      first_last: bits of the first convolution and the last layer, or None: as `bits`.
      overrides: `{path, regular expression, "1x1", "first" or "last": bits}`; the first that matches a layer wins.
      weights: weight scheme: "auto", "integer", "affine", "affine0", "sym", "symfull" or "midrise".
      ranges: range method: "sample", "chunk", "percentile" or "percentile:99.9", "mse" or "entropy".
      weights_range: "minmax" or "mse".

    Raises:
      RuleError: an argument has another form; the message has the expected one.
    """
    pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
    return cls(
      bits=Bits.parse(bits),
      first_last=None if first_last is None else Bits.parse(first_last),
      overrides=tuple((pattern, Bits.parse(text)) for pattern, text in pairs),
      weights=weights,
      ranges=ranges,
      weights_range=weights_range,
    )

  @property
  def needs_histograms(self) -> bool:
    """Whether activation ranges need histograms, not only the extremes of each image."""
    return self.ranges not in _EXTREMES

  def weight_scheme(self, weight_bits: int | None) -> str | None:
    """Weight scheme at `weight_bits` bits, a name in `WEIGHT_SCHEMES`; None for float weights."""
    if weight_bits is None:
      return None
    if self.weights not in (AUTO, INTEGER):
      return self.weights
    few, many = ("symfull", "affine") if self.weights == AUTO else ("midrise", "affine0")
    return few if weight_bits < 4 else many

  def resolve(self, network: Network) -> dict[str, LayerRule]:
    """The rule of every convolution and dense layer of a network, in execution order.

    Raises:
      RuleError: the network has no such layer, or an override matches none.
    """
    layers = intercept.matmul_layers(network)
    if not layers:
      raise RuleError(f"network {network.name} has no convolution or dense layer to quantize")
    names = [layer.name for layer in layers]
    convolutions = [layer.name for layer in layers if layer.kind.startswith("Conv")]
    ends = {"first": (convolutions or names)[0], "last": names[-1]}
    for pattern, _ in self.overrides:
      if not any(_applies(pattern, layer, ends) for layer in layers):
        shown = ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
        raise RuleError(f"override {pattern!r} matches no layer of {network.name}, whose layers are {shown}")
    return {layer.name: self._rule(layer, ends) for layer in layers}

  def _rule(self, layer: intercept.Layer, ends: Mapping[str, str]) -> LayerRule:
    bits = self.first_last if self.first_last is not None and layer.name in ends.values() else self.bits
    bits = next((found for pattern, found in self.overrides if _applies(pattern, layer, ends)), bits)
    return LayerRule(bits.weights, bits.activations, self.weight_scheme(bits.weights))

  def describe(self) -> str:
    """One line for reports: "4w4a, first/last 8w8a, weights affine, ranges sample"."""
    parts = [str(self.bits)]
    if self.first_last is not None:
      parts.append(f"first/last {self.first_last}")
    parts += [f"{pattern} {bits}" for pattern, bits in self.overrides]
    every = (self.bits, *([self.first_last] if self.first_last else []), *(bits for _, bits in self.overrides))
    schemes = {bits.weights: self.weight_scheme(bits.weights) for bits in every if bits.weights is not None}
    if len(set(schemes.values())) == 1:
      parts.append(f"weights {next(iter(schemes.values()))}")
    elif schemes:
      parts.append("weights " + " and ".join(f"{schemes[b]} at {b} bit" for b in sorted(schemes)))
    if schemes and self.weights_range != "minmax":
      parts.append(f"weight ranges {self.weights_range}")
    if any(bits.activations is not None for bits in every):
      parts.append(f"ranges {self.ranges}")
    return ", ".join(parts)

  def to_json(self) -> dict[str, Any]:
    """A JSON-able dict for `from_json`."""
    return {
      "bits": str(self.bits),
      "first_last": None if self.first_last is None else str(self.first_last),
      "overrides": [[pattern, str(bits)] for pattern, bits in self.overrides],
      "weights": self.weights,
      "ranges": self.ranges,
      "weights_range": self.weights_range,
    }

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> QuantRules:
    """Rules from the dict of `to_json`.

    Raises:
      RuleError: the value has other keys or values.
    """
    expected = [field.name for field in dataclasses.fields(cls)]
    if not isinstance(value, Mapping) or sorted(value) != sorted(expected):
      found = sorted(value) if isinstance(value, Mapping) else type(value).__name__
      raise RuleError(f"quantization rules need exactly the keys {expected}, found {found}")
    overrides = value["overrides"]
    if not isinstance(overrides, list) or any(not isinstance(p, (list, tuple)) or len(p) != 2 for p in overrides):
      raise RuleError(f"overrides must be a list of pairs [pattern, bits], found {overrides!r}")
    return cls.parse(
      value["bits"],
      first_last=value["first_last"],
      overrides=[(pattern, bits) for pattern, bits in overrides],
      weights=value["weights"],
      ranges=value["ranges"],
      weights_range=value["weights_range"],
    )


def _applies(pattern: str, layer: intercept.Layer, ends: Mapping[str, str]) -> bool:
  if pattern in ends:
    return layer.name == ends[pattern]
  if pattern == "1x1":
    kernel = layer.kernel_shape or ()
    return layer.kind.startswith("Conv") and all(size == 1 for size in kernel[:-2])
  return matches(layer.name, [pattern])
