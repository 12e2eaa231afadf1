"""How good a network is on labelled images, and how much of another network's behaviour it keeps."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.errors import DataError, NonFiniteError
from kwjax.runtime.data import Batch, ImageData, checked_labels, pad_batch

Images = np.ndarray | jax.Array | ImageData


class Classifier(Protocol):
  """Anything with `apply(images f32[b,h,w,c]) -> logits f32[b,k]` that is registered as a pytree."""

  def apply(self, images: jax.Array) -> jax.Array:
    """Logits f32[b,k]."""


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """Fractions in [0, 1] of `count` images whose label is the first, or among the first five, of the logits."""

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


def evaluate(network: Classifier, images: Images, labels: Any = None, *, batch_size: int = 256) -> Accuracy:
  """Top-1 and top-5 accuracy. Of equal logits the lower class comes first, as in argmax.

  Args:
    network: `Network`, `QuantizedNetwork` or another `Classifier`; compiled once for each structure and batch shape.
    images: `ImageData`, or f32[n,h,w,c] in [0, 1].
    labels: i[n], each below the number of logits; None takes those of `ImageData`.
    batch_size: images a forward pass; the last batch is filled up and the filling is not counted.

  Returns:
    `Accuracy`; `top5` is None where there are at most five classes, since it would be 1.

  Raises:
    DataError: no images, no labels, or labels that do not fit.
    NonFiniteError: the network returns NaN or infinite logits.
  """
  if labels is None and isinstance(images, ImageData):
    labels = images.labels
  if labels is None:
    raise DataError("evaluation needs labels, and these images have none")
  classes, right1, right5 = 0, 0, 0
  wanted = checked_labels(np.asarray(labels), len(images), None, "evaluation")
  for pixels, real_labels, valid in _batches(images, wanted, batch_size):
    logits, hits1, hits5 = _count_hits(network, pixels, real_labels, valid)
    classes = _check(logits, valid, network)
    checked_labels(real_labels, len(valid), classes, "evaluation")
    right1, right5 = right1 + int(hits1), right5 + int(hits5)
  count = len(images)
  return Accuracy(right1 / count, right5 / count if classes > 5 else None, count)


def agreement(network: Classifier, reference: Classifier, images: Images, *, batch_size: int = 256) -> Agreement:
  """Compares a network with a reference on the same images; no labels are needed.

  Args:
    network: the network to judge, usually quantised.
    reference: the network it should behave like; same number of logits.
    images: `ImageData`, or f32[n,h,w,c].
    batch_size: images a forward pass.

  Returns:
    `Agreement`.

  Raises:
    DataError: no images.
    NonFiniteError: one of the networks returns NaN or infinite logits.
  """
  same, divergence, signal, noise = 0, 0.0, 0.0, 0.0
  for pixels, _, valid in _batches(images, None, batch_size):
    logits, expected, sums = _compare(network, reference, pixels, valid)
    _check(logits, valid, network)
    _check(expected, valid, reference)
    # Sums of a batch in float32 lose nothing that matters; those of a whole set could.
    same += int(sums[0])
    divergence, signal, noise = divergence + float(sums[1]), signal + float(sums[2]), noise + float(sums[3])
  count = len(images)
  if noise == 0:
    ratio = math.inf
  else:
    ratio = 10 * math.log10(signal / noise) if signal > 0 else -math.inf
  return Agreement(same / count, divergence / count, ratio, count)


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


def _batches(images: Images, labels: np.ndarray | None, batch_size: int) -> Iterator[Batch]:
  """Batches of one size, so that one compilation serves all; a small set is not blown up to `batch_size`."""
  count = len(images)
  if not count or batch_size < 1:
    raise DataError(f"expected at least one image and batch_size >= 1, got {count} and {batch_size}")
  size = min(batch_size, count)
  for first in range(0, count, size):
    last = min(first + size, count)
    if isinstance(images, ImageData):
      pixels = images.read(np.arange(first, last))
    else:
      pixels = np.asarray(images[first:last], np.float32)
    yield pad_batch(pixels, None if labels is None else labels[first:last], size)


def _check(logits: jax.Array, valid: np.ndarray, network: Classifier) -> int:
  """Number of classes; a NaN compares as false with everything and would otherwise count as a hit."""
  bad = ~np.isfinite(np.asarray(logits, np.float32)[valid]).all(axis=-1)
  if bad.any():
    name = getattr(network, "name", type(network).__name__)
    raise NonFiniteError(f"{name} returns NaN or infinite logits for {int(bad.sum())} of {int(valid.sum())} images")
  return logits.shape[-1]


@jax.jit
def _count_hits(
  network: Classifier, images: jax.Array, labels: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  logits = network.apply(images)
  own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
  lower = jnp.arange(logits.shape[-1]) < labels[:, None]
  # Quantised networks do produce equal logits; the rank counts those of lower classes as before.
  rank = jnp.sum((logits > own) | ((logits == own) & lower), axis=-1)
  return logits, jnp.sum(valid & (rank < 1)), jnp.sum(valid & (rank < 5))


@jax.jit
def _compare(
  network: Classifier, reference: Classifier, images: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  logits = network.apply(images).astype(jnp.float32)
  expected = reference.apply(images).astype(jnp.float32)
  log_p, log_q = jax.nn.log_softmax(expected), jax.nn.log_softmax(logits)
  rows = jnp.stack(
    [
      (jnp.argmax(logits, -1) == jnp.argmax(expected, -1)).astype(jnp.float32),
      jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1),
      jnp.sum(expected**2, -1),
      jnp.sum((expected - logits) ** 2, -1),
    ]
  )
  # where, not a product: what a network makes of the black filling may be NaN.
  return logits, expected, jnp.sum(jnp.where(valid, rows, 0), axis=-1)
