"""How good each copy is: one pass over each image set a copy, and the float network's logits made once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kwjax.network import Network
from kwjax.quantization import QuantizedNetwork
from kwjax.runtime.data import ImageData
from kwjax.runtime.evaluate import predict, score_logits
from kwjax.runtime.parallel import DeviceGroup

HELD_OUT, EVAL = "held_out", "eval"
_NEAR_NATS = 1.0


class Scorer:
  """Judges copies of one float network on the same images; always: the float network sees each set at most once a run."""

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
      held_out: images f32[n,h,w,c], for agreement only.
      eval_data: images for agreement and, where they have labels, accuracy; or None.
      devices: those that the images are spread over.
      should_stop: asked between batches.
    """
    self._network, self._devices, self._should_stop = network, devices, should_stop
    self._sets: dict[str, np.ndarray | ImageData] = {HELD_OUT: held_out}
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

  def _float_logits(self, name: str) -> np.ndarray:
    if name not in self._expected:
      self._expected[name] = self._predict(self._network, name)
    return self._expected[name]

  def _predict(self, network: Network | QuantizedNetwork, name: str) -> np.ndarray:
    size = 256 if self._network.image_shape[0] <= 64 else 32
    return predict(network, self._sets[name], batch_size=size, devices=self._devices, should_stop=self._should_stop)


def is_near(calibrated: Mapping[str, Any]) -> bool:
  """Whether a copy is so near the float network that training with the statistics of batches would lose more than it gains.

  The limit is 1 nat of KL on the held-out images: ResNet-20 at 4w4a (0.15 nats) and EfficientNet-Lite0 at 4w4a (0.51) lose by
  it, ResNet-20 at 2w4a (1.6) gains. Where no image is held out a copy counts as near.
  """
  held_out = calibrated[HELD_OUT]
  return held_out is None or bool(held_out["kl"] < _NEAR_NATS)


def is_closer(tuned: Mapping[str, Any], calibrated: Mapping[str, Any]) -> bool:
  """Whether fine-tuning has brought a copy closer to the float network: a lower KL on the held-out images, so without data.

  Where no image is held out nothing speaks against it.
  """
  after, before = tuned[HELD_OUT], calibrated[HELD_OUT]
  return after is None or before is None or bool(after["kl"] < before["kl"])
