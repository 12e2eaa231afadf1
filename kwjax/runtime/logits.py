"""What the logits of single images say: whether the label ranks first, and how far they are from a reference network's."""

from __future__ import annotations

import numpy as np


def image_hits(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Whether the label is the first, and among the first five, of each image's logits: bool[n,2]."""
  own = np.take_along_axis(logits, labels[:, None].astype(np.int64), axis=1)
  lower = np.arange(logits.shape[1]) < labels[:, None]
  # Quantized networks do give equal logits. Of these the lower classes rank first.
  rank = np.sum((logits > own) | ((logits == own) & lower), axis=1)
  return np.stack([rank < 1, rank < 5], axis=1)


def image_differences(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
  """Same first class, KL(reference || network), squared reference and squared difference of each image: f64[n,4]."""
  found, expected = logits.astype(np.float64), reference.astype(np.float64)
  log_p, log_q = _log_softmax(expected), _log_softmax(found)
  columns = (
    found.argmax(1) == expected.argmax(1),
    np.sum(np.exp(log_p) * (log_p - log_q), axis=1),
    np.sum(expected**2, axis=1),
    np.sum((expected - found) ** 2, axis=1),
  )
  return np.stack(columns, axis=1).astype(np.float64)


def _log_softmax(x: np.ndarray) -> np.ndarray:
  shifted = x - x.max(axis=1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
