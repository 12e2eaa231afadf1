"""How good each student is: one pass over each image set a student, and the float network's logits made once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from kwjax.network import Network
from kwjax.quantization import QuantizedNetwork
from kwjax.runtime.data import ImageData
from kwjax.runtime.devices import processes
from kwjax.runtime.devices.parallel import DeviceGroup
from kwjax.runtime.evaluate import Accuracy, Agreement, predict, score_logits
from kwjax.runtime.logits import image_differences

HELD_OUT, EVAL = "held_out", "eval"
NEAR_NATS = 1.0
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Score:
  """How good a network is; None where there were no images or no labels for it.

  Attributes:
    accuracy: on the labelled images.
    held_out: agreement with the float network on the held-out images.
    eval: agreement with the float network on the labelled images.
  """

  accuracy: Accuracy | None
  held_out: Agreement | None
  eval: Agreement | None

  @classmethod
  def from_json(cls, found: Mapping[str, Any]) -> Score:
    """The score that `Scorer.score` returned and a JSON file kept, where infinity is null."""

    def agreement(name: str) -> Agreement | None:
      values = found[name]
      return values and Agreement(**{**values, "sqnr_db": math.inf if values["sqnr_db"] is None else values["sqnr_db"]})

    return cls(found["accuracy"] and Accuracy(**found["accuracy"]), agreement(HELD_OUT), agreement(EVAL))

  def to_json(self) -> dict[str, Any]:
    """What `from_json` reads."""
    found = dataclasses.asdict(self)
    for name in (HELD_OUT, EVAL):
      if found[name] and not math.isfinite(found[name]["sqnr_db"]):
        found[name]["sqnr_db"] = None
    return found

  def describe(self, held_out: str = "held-out images") -> str:
    """The score in a line: accuracy where it was measured, and agreement.

    Args:
      held_out: what the held-out images are called.
    """
    parts = [f"top-1 {self.accuracy.top1:.2%}"] if self.accuracy else []
    for found, images in ((self.eval, "labelled images"), (self.held_out, held_out)):
      if found:
        parts.append(f"agrees with float on {found.top1:.1%} of {found.count} {images}")
    return ", ".join(parts)


class Scorer:
  """Judges students of one float network on the same images; always: the float network sees each set at most once a run."""

  def __init__(
    self,
    network: Network,
    held_out: np.ndarray,
    eval_data: ImageData | None,
    *,
    devices: DeviceGroup,
    should_stop: Callable[[], bool],
  ) -> None:
    """Takes the float network and the sets; forwards nothing yet.

    Args:
      network: the float network.
      held_out: images f32[n,h,w,c], for agreement only; may be none.
      eval_data: images for agreement and, where they have labels, accuracy; or None.
      devices: those that the images are spread over.
      should_stop: asked between batches.
    """
    self._network, self._devices, self._should_stop = network, devices, should_stop
    self._sets: dict[str, np.ndarray | ImageData] = {HELD_OUT: held_out} if len(held_out) else {}
    if eval_data is not None:
      self._sets[EVAL] = eval_data
    self._expected: dict[str, np.ndarray] = {}

  def score(self, network: Network | QuantizedNetwork) -> dict[str, Any]:
    """Accuracy on the labelled images and agreement with the float network on both sets; null where there is none.

    Raises:
      NonFiniteError: the network returns NaN or infinite logits.
      Interrupted: the run was asked to stop.
    """
    is_float = network is self._network
    found: dict[str, Any] = {"accuracy": None, HELD_OUT: None, EVAL: None}
    for name, images in self._sets.items():
      labels = images.labels if isinstance(images, ImageData) else None
      if is_float and labels is None:
        continue
      expected = self._float_logits(name)
      logits = expected if is_float else self._predict(network, name)
      result = score_logits(logits, len(images), labels, None if is_float else expected)
      found[name] = None if result.agreement is None else dataclasses.asdict(result.agreement)
      if result.accuracy is not None:
        found["accuracy"] = dataclasses.asdict(result.accuracy)
    return found

  def divergences(self, network: QuantizedNetwork) -> list[float] | None:
    """KL in nats from the float network on each held-out image; None without any."""
    if HELD_OUT not in self._sets:
      return None
    by_image = image_differences(self._predict(network, HELD_OUT), self._float_logits(HELD_OUT))[:, 1]
    return processes.gather(by_image).tolist()

  def _float_logits(self, name: str) -> np.ndarray:
    if name not in self._expected:
      self._expected[name] = self._predict(self._network, name)
    return self._expected[name]

  def _predict(self, network: Network | QuantizedNetwork, name: str) -> np.ndarray:
    size = 256 if self._network.image_shape[0] <= 64 else 32
    return predict(network, self._sets[name], batch_size=size, devices=self._devices, should_stop=self._should_stop)


def closest(found: Mapping[T, Sequence[float]]) -> T:
  """The first candidate, unless a later one is closer to the float network by more than chance.

  A later one takes its place if the mean of the paired differences of the images exceeds their standard error. So nothing is
  changed for a gain that other images would not show.

  Args:
    found: KL on each held-out image, of every candidate; the simplest first. All have the same images.
  """
  names = list(found)
  taken = names[0]
  for name in names[1:]:
    gain = np.subtract(found[taken], found[name])
    error = gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    if gain.mean() > error:
      taken = name
  return taken


def is_near(calibrated: Score, nats: float = NEAR_NATS) -> bool:
  """Whether a student is so near the float network that training with the statistics of batches would lose more than it gains.

  The limit is 1 nat of KL on the held-out images: ResNet-20 at 4w4a (0.15 nats) and EfficientNet-Lite0 at 4w4a (0.51) lose by
  it, ResNet-20 at 2w4a (1.6) gains. Where no image is held out a student counts as near.
  """
  return calibrated.held_out is None or calibrated.held_out.kl < nats


def is_closer(tuned: Score, calibrated: Score) -> bool:
  """Whether fine-tuning has brought a student closer to the float network: a lower KL on the held-out images, so without data.

  Where no image is held out nothing speaks against it.
  """
  after, before = tuned.held_out, calibrated.held_out
  return after is None or before is None or after.kl < before.kl
