"""Which classes a network sees in a set of images, and how unevenly: the bias of synthetic data."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from kwjax.errors import DataError


class ClassMass(NamedTuple):
  """Share of each class in what a network says of some images; each sums to 1.

  Attributes:
    soft: f64[k], mean of the softmax.
    hard: f64[k], share of the images whose largest logit it is; the first of equal ones.
  """

  soft: np.ndarray
  hard: np.ndarray


def class_mass(logits: Any) -> ClassMass:
  r"""Mean prediction by class, $\frac1n \sum_i \mathrm{softmax}(z_i)$ and $\frac1n \sum_i [\arg\max z_i = k]$.

  Args:
    logits: f[n,k], of n >= 1 images.

  Raises:
    DataError: they do not have that form, or are not finite.
  """
  found = np.asarray(logits, np.float64)
  if found.ndim != 2 or not found.size or not np.isfinite(found).all():
    raise DataError(f"class_mass: expected finite logits [n,k] of at least one image, found {list(found.shape)}")
  odds = np.exp(found - found.max(axis=1, keepdims=True))
  soft = (odds / odds.sum(axis=1, keepdims=True)).mean(axis=0)
  return ClassMass(soft, np.bincount(found.argmax(axis=1), minlength=found.shape[1]) / len(found))


def evenness(mass: Any) -> float:
  r"""Entropy over that of the uniform distribution, $-\sum_k m_k \log m_k / \log K$: 1 if all classes are alike, 0 if one is all.

  Args:
    mass: f[k], shares that sum to 1; k >= 2.

  Raises:
    DataError: they are not such shares.
  """
  shares = _shares(mass)
  if len(shares) < 2:
    raise DataError("evenness needs at least two classes, found 1")
  present = shares[shares > 0]
  return max(0.0, float(-(present * np.log(present)).sum() / math.log(len(shares))))


def tail_share(mass: Any, share: float = 0.1) -> float:
  """Mass of the least predicted classes over what they would have if all classes were alike; 1 is even, 0 a lost tail.

  Args:
    mass: f[k], shares that sum to 1.
    share: of the classes that count as the tail, in (0, 1]; at least one class, rounded up.

  Returns:
    In [0, 1].

  Raises:
    DataError: they are not such shares, or the tail is out of range.
  """
  shares = _shares(mass)
  if not 0 < share <= 1:
    raise DataError(f"the tail must be a share of the classes in (0, 1], found {share}")
  # 0.1 * 30 is 3.0000000000000004.
  size = math.ceil(round(share * len(shares), 9))
  return float(np.sort(shares)[:size].sum() * len(shares) / size)


def _shares(mass: Any) -> np.ndarray:
  shares = np.asarray(mass, np.float64)
  if shares.ndim != 1 or not shares.size or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-3:
    raise DataError(f"expected shares [k] that are not negative and sum to 1, found {list(shares.shape)}")
  return shares
