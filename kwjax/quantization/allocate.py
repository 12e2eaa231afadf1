"""Bits per layer: the best use of a budget of bits, by the measured sensitivity of each layer."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kwjax.errors import RuleError
from kwjax.network import Array, Network
from kwjax.quantization.extremes import check_images
from kwjax.quantization.rules import Bits, QuantRules
from kwjax.quantization.sensitivity import Sensitivity, measure_sensitivity
from kwjax.runtime.devices.parallel import Devices

CANDIDATES = (2, 3, 4, 5, 6, 8)
_UNITS = 200_000
_CURVE_UNITS = 5_000


class Budget(NamedTuple):
  """A budget of mean bits or size; None leaves that side at the rules' bits.

  Attributes:
    weights: mean bits of a weight, over all kernels.
    activations: mean bits of a layer's input, over all input values of one image.
    kilobytes: size of all kernels without scales, in 1000 bytes, instead of `weights`.
  """

  weights: float | None
  activations: float | None
  kilobytes: float | None = None

  @classmethod
  def parse(cls, budget: str | Budget) -> Budget:
    """Parse "4w4a", "3.5w4a", or with a size of the weights "330kBw4a" or "1.2MBw4a"; 32 bits mean None.

    Raises:
      RuleError: the text has another form, mean bits are not 2 to 8, or the size is not positive.
    """
    if isinstance(budget, Budget):
      found = budget
    else:
      form = re.fullmatch(r"([0-9.]+)(kB|MB|)w([0-9.]+)a", str(budget).strip())
      try:
        amount, bits = (0.0, 0.0) if form is None else (float(form[1]), float(form[3]))
      except ValueError:
        amount, bits = 0.0, 0.0
      activations = None if bits == 32 else bits
      if form is not None and form[2]:
        found = cls(None, activations, amount * (1000 if form[2] == "MB" else 1))
      else:
        found = cls(None if amount == 32 else amount, activations)
    ends = found[:2]
    too_small = found.kilobytes is not None and not 0 < found.kilobytes < math.inf
    if too_small or any(bits is not None and not 2 <= bits <= 8 for bits in ends):
      raise RuleError(
        "a budget is mean bits from 2 to 8 of weights and activations, such as 4w4a or 3.5w4a, or a size of the weights, "
        f"such as 330kBw4a, found {budget!r}"
      )
    return found

  def in_bits(self, parameters: int) -> Budget:
    """The same budget with the size as mean bits, at most 8, for a given number of weights.

    Raises:
      RuleError: the size is below 2 bits for each weight.
    """
    if self.kilobytes is None:
      return self
    mean = self.kilobytes * 8000 / parameters
    if mean < 2:
      raise RuleError(
        f"{self.kilobytes:g} kB are {mean:.2f} bits for each of {parameters} weights: at least 2, {parameters / 4000:g} kB, "
        "are needed"
      )
    return Budget(min(mean, 8.0), self.activations)


class Point(NamedTuple):
  """One point of the curve of predicted loss by budget.

  Attributes:
    bits: mean bits of the sides that the curve varies.
    kilobytes: size of all kernels at these bits without scales, in 1000 bytes.
    predicted: sum of the sensitivities of the best allocation, in nats.
    uniform: the same with equal bits in every layer; None if the mean is no candidate.
  """

  bits: float
  kilobytes: float
  predicted: float
  uniform: float | None


@dataclasses.dataclass(frozen=True)
class Allocation:
  """Bits by layer.

  Attributes:
    rules: one override for each layer; calibrate and quantize with them.
    sensitivity: the measurement, `{layer: Sensitivity}`.
    curve: predicted loss by mean bits, ascending.
    mean_weight_bits: of `rules`, over all weights.
    mean_activation_bits: of `rules`, over all inputs.
  """

  rules: QuantRules
  sensitivity: dict[str, Sensitivity]
  curve: tuple[Point, ...]
  mean_weight_bits: float
  mean_activation_bits: float


def allocate_bits(
  network: Network,
  images: Array | np.ndarray,
  *,
  budget: str | Budget,
  candidates: Sequence[int] = CANDIDATES,
  rules: QuantRules | None = None,
  key: Array,
  batch_size: int = 64,
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> Allocation:
  r"""The best bits for every layer within a budget of mean bits or bytes.

  $\min \sum_l s_l(b_l)$ with $\sum_l n_l b_l \le B \sum_l n_l$.

  $s_l(b)$ = KL(float || layer l alone at b bits), measured on the images; $n_l$: its weights, or the values that it reads.
  Weights and activations are separate problems. Each is solved exactly by dynamic programming; where sizes have no large
  common divisor, they are rounded up to units of 1/200000 of the budget.

  Args:
    network: the float network.
    images: f32[n,h,w,c] in [0,1], such as synthetic ones.
    budget: mean bits, "4w4a" or "3.5w4a", or the size of all kernels and the mean bits of activations, "330kBw4a"; 32 leaves
      a side as the rules have it.
    candidates: bits that a layer may get, 2 to 8.
    rules: weight scheme, how ranges are read, and the bits of a side without budget. Default: those of the paper at 8w8a,
      whose weights have no integer form from 4 bits on. `QuantRules.parse("8w8a", weights="affine0")` has one, for export.
    key: PRNG key of the calibration's draws.
    batch_size: most images forwarded at a time; no influence on the result but for rounding.
    devices: number of devices per process, the devices, or None: all accelerators, or one CPU per process.
    progress: show a progress bar.
    should_stop: called after each batch; True ends the pass.

  Returns:
    Allocation.

  Raises:
    DataError: there are no images, or they do not fit the network.
    RuleError: the budget or the candidates are malformed, or no allocation fits.
    Interrupted: `should_stop` returned True, in any process.

  Source: Yao et al. (2021), "HAWQ-V3", arXiv:2011.10680, integer programming over layers; Cai et al. (2020), "ZeroQ",
  arXiv:2001.00281, 3.2, KL of one layer at a time on synthetic images.
  """
  wanted = Budget.parse(budget)
  bits = sorted(set(candidates))
  if not bits or not all(2 <= b <= 8 for b in bits):
    raise RuleError(f"candidates must be bits from 2 to 8, found {tuple(candidates)}")
  base = QuantRules.parse("8w8a") if rules is None else rules
  check_images(network, images)
  table = measure_sensitivity(
    network,
    images,
    bits,
    base,
    key=key,
    batch_size=batch_size,
    devices=devices,
    progress=progress,
    should_stop=should_stop,
  )
  return allocate_from(network, table, budget=wanted, rules=base)


def allocate_from(
  network: Network, sensitivity: Mapping[str, Sensitivity], *, budget: str | Budget, rules: QuantRules
) -> Allocation:
  """As `allocate_bits`, from sensitivities that were measured before: further budgets cost nothing.

  Args:
    network: the float network.
    sensitivity: of `measure_sensitivity`.
    budget: mean bits or a size, as in `allocate_bits`.
    rules: weight scheme, range method, and the bits of a side without a budget.

  Raises:
    RuleError: the budget is malformed, or no allocation fits.
  """
  resolved = rules.resolve(network)
  wanted = Budget.parse(budget).in_bits(sum(s.parameters for s in sensitivity.values()))
  sides = {}
  for side, mean, sizes in (
    ("weights", wanted.weights, [s.parameters for s in sensitivity.values()]),
    ("activations", wanted.activations, [s.inputs for s in sensitivity.values()]),
  ):
    costs = [getattr(s, side) for s in sensitivity.values()]
    sides[side] = None if mean is None else best_bits(costs, sizes, mean)
  overrides = []
  for index, name in enumerate(sensitivity):
    weights = resolved[name].weight_bits if sides["weights"] is None else sides["weights"][index]
    activations = resolved[name].activation_bits if sides["activations"] is None else sides["activations"][index]
    overrides.append((name, Bits(weights, activations)))
  chosen = dataclasses.replace(rules, first_last=None, overrides=tuple(overrides))
  return Allocation(
    rules=chosen,
    sensitivity=dict(sensitivity),
    curve=_curve(sensitivity, wanted),
    mean_weight_bits=_mean([b.weights for _, b in overrides], [s.parameters for s in sensitivity.values()]),
    mean_activation_bits=_mean([b.activations for _, b in overrides], [s.inputs for s in sensitivity.values()]),
  )


def best_bits(
  costs: Sequence[Mapping[int, float]], sizes: Sequence[int], mean: float, *, units: int = _UNITS
) -> list[int]:
  r"""The choice with the least sum of costs whose mean bits, weighted by sizes, are at most `mean`.

  Args:
    costs: `{bits: cost}` of each item.
    sizes: of each item.
    mean: largest mean of the bits.
    units: parts of the budget if the sizes have no common divisor that makes fewer; sizes are rounded up to them.

  Returns:
    Bits of each item.

  Raises:
    RuleError: the fewest bits exceed the mean.
  """
  fewest = [min(cost) for cost in costs]
  # Only the bits beyond the fewest are allocated; the fewest are always exact.
  spare, divisor = mean * sum(sizes) - float(np.dot(fewest, sizes)), math.gcd(*sizes)
  if spare < -1e-6:
    raise RuleError(f"no choice of bits has a mean of {mean:g} or less: the fewest are {min(fewest)}")
  unit = divisor if spare <= units * divisor else spare / units
  room = int(spare / unit + 1e-6)
  best = np.zeros(room + 1)
  choices: list[np.ndarray] = []
  for cost, size, least in zip(costs, sizes, fewest, strict=True):
    found, chosen = np.full(room + 1, np.inf), np.zeros(room + 1, np.int8)
    for bits, value in cost.items():
      needed = math.ceil(size * (bits - least) / unit - 1e-6)
      if needed > room:
        continue
      total = np.full(room + 1, np.inf)
      total[needed:] = best[: room + 1 - needed] + value
      better = total < found
      found, chosen = np.where(better, total, found), np.where(better, np.int8(bits), chosen)
    best, choices = found, [*choices, chosen]
  result, place = [], room
  for chosen, size, least in zip(choices[::-1], sizes[::-1], fewest[::-1], strict=True):
    result.append(int(chosen[place]))
    place -= math.ceil(size * (result[-1] - least) / unit - 1e-6)
  return result[::-1]


def _mean(bits: Sequence[int | None], sizes: Sequence[int]) -> float:
  return sum((b or 32) * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes)


def _curve(sensitivity: Mapping[str, Sensitivity], budget: Budget) -> tuple[Point, ...]:
  sides = [side for side, mean in zip(("weights", "activations"), budget[:2], strict=True) if mean is not None]
  sizes = {
    "weights": [s.parameters for s in sensitivity.values()],
    "activations": [s.inputs for s in sensitivity.values()],
  }
  costs = {side: [getattr(s, side) for s in sensitivity.values()] for side in sides}
  candidates = sorted(next(iter(sensitivity.values())).weights)
  points = []
  for mean in np.arange(candidates[0], candidates[-1] + 0.25, 0.5).tolist() if sides else ():
    predicted = 0.0
    for side in sides:
      chosen = best_bits(costs[side], sizes[side], mean, units=_CURVE_UNITS)
      predicted += sum(cost[b] for cost, b in zip(costs[side], chosen, strict=True))
    uniform = None
    if mean in candidates:
      uniform = sum(cost[int(mean)] for side in sides for cost in costs[side])
    points.append(Point(mean, sum(sizes["weights"]) * mean / 8000, predicted, uniform))
  return tuple(points)
