"""What a compression decided, and why: plain sentences with the numbers they rest on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from kwjax.analysis.scoring import Score, is_closer
from kwjax.analysis.similarity import owned_by_outliers
from kwjax.batchnorm import OUTLIER_NATS
from kwjax.distillation import DistillConfig
from kwjax.network import Network
from kwjax.quantization import QuantRules
from kwjax.quantization.methods import Correction, Method
from kwjax.reconstruction import UnitReport
from kwjax.synthesis import SampleSet, SynthesisConfig


@dataclasses.dataclass(frozen=True)
class Decision:
  """One choice of a compression.

  Attributes:
    about: what was decided, such as "fine-tuning of 4w4a".
    choice: what was done, as a sentence.
    reason: why, as a sentence.
    numbers: what the reason rests on, by name.
  """

  about: str
  choice: str
  reason: str
  numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    return f"{self.about}: {self.choice} {self.reason}"


def about_images(samples: SampleSet, config: SynthesisConfig | None, used: int, views: int) -> Decision:
  """Which images the students are calibrated with.

  Args:
    samples: all of them.
    config: how they were made; None: they were given.
    used: how many of them; the others are held out.
    views: of each that calibrate.
  """
  held_out = len(samples.images) - used
  each = f" ({views} views of each)" if views > 1 else ""
  choice = f"{used} images{each} calibrate and fine-tune, {held_out} more are held out to measure agreement."
  numbers: dict[str, float] = {"used": used, "held_out": held_out, "views": views}
  if config is None:
    return Decision("images", choice, "The images were given.", numbers)
  reason = f"No images were given, so they come from the network itself (scheme {config.scheme})."
  if "jkl" in samples.history and samples.history["jkl"].shape[1] > 1:
    curve, trimmed = (samples.history[name].mean(0) for name in ("jkl", "jkl_trimmed"))
    numbers |= {"jkl_start": float(curve[0]), "jkl_end": float(curve[-1])}
    reason += f" J_KL went from {curve[0]:.3g} to {curve[-1]:.3g} in {len(curve)} steps"
    if owned_by_outliers(curve[-1], trimmed[-1]):
      numbers |= {"jkl_trimmed_start": float(trimmed[0]), "jkl_trimmed_end": float(trimmed[-1])}
      kept = f"from {trimmed[0]:.3g} to {trimmed[-1]:.3g}"
      reason += f"; without outliers (channels above {OUTLIER_NATS:.0f} nats) {kept}"
    reason += "."
  return Decision("images", choice, reason, numbers)


def about_calibration(
  rules: QuantRules,
  method: Method,
  network: Network,
  equalized_pairs: int | None,
  tried: Mapping[Correction, float | None],
) -> list[Decision]:
  """How a precision is calibrated.

  Args:
    rules: of the precision, with the method's ranges.
    method: of the calibration.
    network: the float network.
    equalized_pairs: pairs of layers whose scales were equalized; None: equalization was not asked for.
    tried: KL on the held-out images with each correction that was tried, the one that was taken first.
  """
  name = str(rules.bits)
  found = []
  schemes = sorted({rule.weight_scheme for rule in rules.resolve(network).values() if rule.weight_scheme})
  if schemes:
    runs = "affine" not in schemes
    found.append(
      Decision(
        f"weights of {name}",
        f"Weight scheme {' and '.join(schemes)}.",
        "Integer kernels can run it." if runs else "It has a real zero point, so integer kernels cannot run it.",
      )
    )
    found.append(_about_weight_ranges(name, rules, method))
  found.append(
    Decision(f"activations of {name}", f"Ranges by the method {rules.ranges!r}.", _why_ranges(method, rules))
  )
  if equalized_pairs is not None:
    found.append(
      Decision(
        f"equalization of {name}",
        f"The scales of {equalized_pairs} pairs of layers were equalized.",
        "It was asked for; it changes nothing in float.",
        {"pairs": equalized_pairs},
      )
    )
  found.append(_about_correction(name, method, tried))
  return found


_CORRECTED: Mapping[Correction, str] = {
  "none": "The moments of the channels are not corrected.",
  "means": "The means of all channels are corrected.",
  "moments": "The means and variances of all channels are corrected.",
}


def _about_correction(name: str, method: Method, tried: Mapping[Correction, float | None]) -> Decision:
  taken = next(iter(tried))
  numbers = {f"kl_{correction}": kl for correction, kl in tried.items() if kl is not None}
  if len(tried) > 1 and numbers:
    shown = ", ".join(f"{numbers[f'kl_{correction}']:.3g} with {correction}" for correction in method.corrections())
    rule = "Fewer corrections than all have to gain more than a standard error."
    reason = f"KL on the held-out images in nats: {shown} corrected. {rule}"
  elif taken == "none":
    reason = "The method leaves them as they are."
  else:
    reason = "They match the float network's on the images again."
  return Decision(f"correction of {name}", _CORRECTED[taken], reason, numbers)


def about_reconstruction(bits: str, tried: Mapping[str, float | None], reports: Sequence[UnitReport]) -> Decision:
  """Whether a precision is reconstructed.

  Args:
    bits: the precision.
    tried: KL on the held-out images of the calibrated student, of the reconstructed one ("reconstructed") and of that with
      its means ("means") or its moments corrected ("moments"), the one that was taken first; empty where 8 bits make it
      needless.
    reports: of the units.
  """
  about = f"reconstruction of {bits}"
  if not tried:
    return Decision(about, "It is left out.", "With 8 bits throughout calibration suffices.")
  taken = next(iter(tried))
  numbers = {f"kl_{name}": kl for name, kl in tried.items() if kl is not None}
  kept = sum(report.kept for report in reports)
  choice = {
    "calibrated": "The calibrated student is kept.",
    "reconstructed": f"Rounding and activation steps of {kept} of {len(reports)} units are reconstructed.",
    "means": f"{kept} of {len(reports)} units are reconstructed, and the means of all channels corrected.",
    "moments": f"{kept} of {len(reports)} units are reconstructed, and the means and variances of all channels corrected.",
  }[taken]
  if not numbers:
    return Decision(about, choice, "No image is held out, so nothing speaks against it.", numbers)
  before = numbers["kl_calibrated"]
  others = [kl for name, kl in numbers.items() if name != "kl_calibrated"]
  after = min(others) if taken == "calibrated" else numbers[f"kl_{taken}"]
  reason = f"It takes the KL from the float network on the held-out images from {before:.3g} to {after:.3g} nats"
  chance = ", a gain within a standard error" if taken == "calibrated" and after < before else ""
  return Decision(about, choice, f"{reason}{chance}.", numbers)


def _why_ranges(method: Method, rules: QuantRules) -> str:
  if method.ranges != "by-bits":
    return "The method says so for all bits."
  if rules.ranges == "mse":
    return "With few levels the least squared error counts for more than the rare extremes."
  return "With 8 bits the extremes of each image cost little."


def _about_weight_ranges(name: str, rules: QuantRules, method: Method) -> Decision:
  numbers = {} if rules.bits.weights is None else {"weight_bits": float(rules.bits.weights)}
  least_error = rules.weights_range == "mse"
  choice = (
    "Weight ranges of least squared error." if least_error else "Weight ranges from the least to the largest weight."
  )
  if method.weights_range != "by-grid":
    reason = "The method says so for all bits."
  elif least_error:
    reason = "Leaving the largest weights out gains more than it loses."
  else:
    reason = "Of four levels with one above zero, leaving the largest weights out loses more than it gains."
  return Decision(f"weight ranges of {name}", choice, reason, numbers)


def about_fine_tuning(
  bits: str, config: DistillConfig | None, *, near: bool, calibrated: Score, wanted: bool = True
) -> Decision:
  """How the last precision is fine-tuned.

  Args:
    bits: the precision.
    config: of the fine-tuning; None: there is none.
    near: whether the calibrated student counts as near the float network.
    calibrated: its score.
    wanted: whether a fine-tuning was asked for.
  """
  about = f"fine-tuning of {bits}"
  if config is None:
    if near and calibrated.held_out is not None and wanted:
      kl = calibrated.held_out.kl
      reason = f"The reconstructed student is near the float network: KL {kl:.3g} nats on the held-out images."
      return Decision(about, "It is left out.", reason, {"kl": kl})
    return Decision(about, "It is left out.", "Its number of steps is 0 or it was not asked for.")
  statistics = "stay as they are" if config.batch_norm == "frozen" else "follow the batches"
  choice = f"{config.steps} steps at a learning rate of {config.learning_rate:g}; BatchNorm's statistics {statistics}."
  if calibrated.held_out is None:
    return Decision(about, choice, "No image is held out to tell how near the calibrated student is.")
  distance = "near" if near else "far from"
  kl = calibrated.held_out.kl
  reason = f"The calibrated student counts as {distance} the float network: KL {kl:.3g} nats on the held-out images."
  return Decision(about, choice, reason, {"kl": kl})


def about_kept(bits: str, calibrated: Score, tuned: Score) -> Decision:
  """Which student of the last precision is kept: the calibrated or the fine-tuned one."""
  kept = is_closer(tuned, calibrated)
  choice = "The fine-tuned student is kept." if kept else "The calibrated student is kept."
  if calibrated.held_out is None or tuned.held_out is None:
    return Decision(f"student of {bits}", choice, "No image is held out, so nothing speaks against it.")
  before, after = calibrated.held_out.kl, tuned.held_out.kl
  reason = (
    f"Fine-tuning took its KL from the float network on the held-out images from {before:.3g} to {after:.3g} nats."
  )
  return Decision(f"student of {bits}", choice, reason, {"kl_calibrated": before, "kl_fine_tuned": after})
