"""Accuracy of a network on labelled images, and its agreement with a reference network."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.errors import DataError
from kwjax.runtime.data.images import ImageData, checked_labels
from kwjax.runtime.devices import processes
from kwjax.runtime.devices.forwarding import Images, forward_rows
from kwjax.runtime.devices.parallel import Devices
from kwjax.runtime.logits import image_differences, image_hits


class Classifier(Protocol):
  """Anything with `apply(images f32[b,h,w,c]) -> logits f32[b,k]` that is registered as a pytree."""

  def apply(self, images: jax.Array) -> jax.Array:
    """Logits f32[b,k]."""


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """How often a network is right on labelled images.

  Attributes:
    top1: fraction in [0, 1] of images whose label has the largest logit.
    top5: fraction in [0, 1] of images whose label is among the five largest; None for at most five classes.
    count: number of images.
  """

  top1: float
  top5: float | None
  count: int


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How close one network's logits are to those of a reference, on `count` images.

  Attributes:
    top1: fraction of images with the same first class.
    kl: mean of KL(softmax(reference) || softmax(network)), nats.
    sqnr_db: 10 log10(sum reference^2 / sum (reference - network)^2) over all logits; infinite if they are equal.
    count: number of images.
  """

  top1: float
  kl: float
  sqnr_db: float
  count: int


class Score(NamedTuple):
  """What one pass over an image set says of a network; None where labels or reference logits were missing."""

  accuracy: Accuracy | None
  agreement: Agreement | None


def evaluate(
  network: Classifier,
  images: Images,
  labels: Any = None,
  *,
  batch_size: int = 256,
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> Accuracy:
  """Top-1 and top-5 accuracy. Of equal logits the lower class comes first, as in argmax.

  Args:
    network: `Network`, `QuantizedNetwork` or another `Classifier`. It is compiled once per structure and batch shape.
    images: `ImageData`, or f32[n,h,w,c] in [0, 1].
    labels: i[n], each below the number of logits; None takes those of `ImageData`.
    batch_size: most images forwarded at a time. The last batch is padded, and the padding is not counted.
    devices: number of devices per process, the devices, or None: all accelerators, or one CPU per process.
    progress: show a progress bar.
    should_stop: called after each batch; True ends the pass.

  Returns:
    `Accuracy`; `top5` is None where there are at most five classes, since it would be 1.

  Raises:
    DataError: there are no images or no labels, or the labels do not fit.
    NonFiniteError: the network returns NaN or infinite logits.
    Interrupted: `should_stop` returned True.
  """
  if labels is None and not (isinstance(images, ImageData) and images.labels is not None):
    raise DataError("evaluation needs labels, and these images have none")
  found = score(
    network, images, labels, batch_size=batch_size, devices=devices, progress=progress, should_stop=should_stop
  )
  assert found.accuracy is not None
  return found.accuracy


def agreement(
  network: Classifier,
  reference: Classifier,
  images: Images,
  *,
  batch_size: int = 256,
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> Agreement:
  """Compares a network with a reference on the same images; no labels are needed.

  Args:
    network: the network to judge, usually quantized.
    reference: the network it should behave like; same number of logits.
    images: `ImageData`, or f32[n,h,w,c] in [0, 1].
    batch_size: most images forwarded at a time.
    devices: number of devices per process, the devices, or None: all accelerators, or one CPU per process.
    progress: show a progress bar.
    should_stop: called after each batch; True ends the pass.

  Returns:
    `Agreement`.

  Raises:
    DataError: there are no images.
    NonFiniteError: one of the networks returns NaN or infinite logits.
    Interrupted: `should_stop` returned True.
  """
  where: dict[str, Any] = {
    "batch_size": batch_size, "devices": devices, "progress": progress, "should_stop": should_stop
  }  # fmt: skip
  found = score(network, images, reference_logits=predict(reference, images, **where), **where).agreement
  assert found is not None
  return found


def score(
  network: Classifier,
  images: Images,
  labels: Any = None,
  reference_logits: np.ndarray | None = None,
  *,
  batch_size: int = 256,
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> Score:
  """Accuracy and agreement of a network in one pass over the images.

  Args:
    network: the network to judge.
    images: `ImageData`, or f32[n,h,w,c] in [0, 1].
    labels: i[n]; None takes those of `ImageData`, if it has any.
    reference_logits: what `predict` returned for the reference network on the same images, or None.
    batch_size: most images forwarded at a time.
    devices: number of devices per process, the devices, or None: all accelerators, or one CPU per process.
    progress: show a progress bar.
    should_stop: called after each batch; True ends the pass.

  Returns:
    `Score`, over the images of all processes.

  Raises:
    DataError: there are no images, or the labels do not fit.
    NonFiniteError: the network returns NaN or infinite logits.
    Interrupted: `should_stop` returned True.
  """
  if labels is None and isinstance(images, ImageData):
    labels = images.labels
  wanted = None if labels is None else checked_labels(np.asarray(labels), len(images), None, "evaluation")
  logits = predict(network, images, batch_size=batch_size, devices=devices, progress=progress, should_stop=should_stop)
  return score_logits(logits, len(images), wanted, reference_logits)


def score_logits(
  logits: np.ndarray, count: int, labels: np.ndarray | None = None, reference_logits: np.ndarray | None = None
) -> Score:
  """As `score`, from logits that are there already.

  Args:
    logits: what `predict` returned for `count` images.
    count: images of all processes.
    labels: i[count], or None.
    reference_logits: what `predict` returned for the reference network on the same images, or None.
  """
  own = processes.share(count)
  accuracy, agreed = None, None
  if labels is not None:
    wanted = np.asarray(checked_labels(labels, count, logits.shape[1], "evaluation"))
    hits = _total(image_hits(logits, wanted[own.start : own.stop]))
    accuracy = Accuracy(hits[0] / count, hits[1] / count if logits.shape[1] > 5 else None, count)
  if reference_logits is not None:
    same, divergence, signal, noise = _total(image_differences(logits, reference_logits))
    if noise == 0:
      ratio = math.inf
    else:
      ratio = 10 * math.log10(signal / noise) if signal > 0 else -math.inf
    agreed = Agreement(same / count, divergence / count, ratio, count)
  return Score(accuracy, agreed)


def predict(
  network: Classifier,
  images: Images,
  *,
  batch_size: int = 256,
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> np.ndarray:
  """Logits of images, on the host. Of several processes each forwards and gets its own contiguous share of the images.

  Args:
    network: what to forward.
    images: `ImageData`, or f32[n,h,w,c] in [0, 1].
    batch_size: most images forwarded at a time, see `kwjax.runtime.devices.batch_sizes.forward_size`. The last batch is padded.
    devices: number of devices per process, the devices, or None: all accelerators, or one CPU per process.
    progress: show a progress bar.
    should_stop: called after each batch; True ends the pass.

  Returns:
    f32[n,k]; of several processes the rows `kwjax.runtime.devices.processes.share(n)`.

  Raises:
    DataError: there are no images.
    NonFiniteError: the network returns NaN or infinite logits.
    Interrupted: `should_stop` returned True, in any process.
  """

  def check(logits: np.ndarray) -> str | None:
    # A NaN compares as false with everything and would otherwise count as a hit.
    bad = int((~np.isfinite(logits).all(axis=-1)).sum())
    name = getattr(network, "name", type(network).__name__)
    return f"{name} returns NaN or infinite logits for {bad} of {len(logits)} images" if bad else None

  rows = forward_rows(
    _logits,
    network,
    images,
    batch_size=batch_size,
    description="forward",
    devices=devices,
    progress=progress,
    should_stop=should_stop,
    check=check,
  )
  return np.concatenate(list(rows))


def _logits(network: Classifier, images: jax.Array) -> jax.Array:
  return jnp.asarray(network.apply(images), jnp.float32)


def wilson_interval(successes: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
  r"""Wilson's score interval for a proportion; unlike p +- z s it stays in [0, 1] and is right near the ends.

  (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), with p = successes/n. E. B. Wilson, "Probable inference,
  the law of succession, and statistical inference", JASA 22 (1927).

  Args:
    successes: number of hits, between 0 and `count`; a mean over seeds may be fractional.
    count: number of trials, at least 1.
    confidence: two-sided coverage, in (0, 1).

  Returns:
    (low, high), fractions in [0, 1].

  Raises:
    DataError: an argument is out of range.
  """
  if not (count >= 1 and 0 <= successes <= count and 0 < confidence < 1):
    raise DataError(f"no interval for {successes} of {count} at confidence {confidence}")
  z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
  p = successes / count
  centre, factor = p + z * z / (2 * count), 1 + z * z / count
  spread = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
  return max(0.0, (centre - spread) / factor), min(1.0, (centre + spread) / factor)


def _total(rows: np.ndarray) -> list[float]:
  """Column sums over the rows of all processes."""
  return [math.fsum(column) for column in zip(*processes.exchange(rows.sum(axis=0).tolist()), strict=True)]
