"""What a network says a set of images shows: how many of them per class, and how evenly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kwjax.errors import KwjaxError


class ClassBalance(NamedTuple):
  """How the answers of a network spread over its classes.

  Attributes:
    counts: i64[k], images whose largest logit is that class's.
    effective: exp(-sum_c p_c ln p_c) with p = counts / n: the number of classes that an even set with the same entropy
      would have, from 1 (all images alike) to k.
    aimed: fraction of images whose answer is the class they were made for; None where they were made for none.
  """

  counts: np.ndarray
  effective: float
  aimed: float | None

  def named(self, names: Sequence[str] | None) -> dict[str, int]:
    """`{class: images}` in the order of the classes; a name that two classes share is followed by the index."""
    return dict(zip(class_labels(len(self.counts), names), map(int, self.counts)))


def class_balance(answers: np.ndarray, num_classes: int, *, targets: np.ndarray | None = None) -> ClassBalance:
  """Counts a network's answers by class.

  Args:
    answers: i[n], the class of each image's largest logit.
    num_classes: k.
    targets: i[n], the classes that the images were made for, or None.

  Raises:
    KwjaxError: there are no images, an answer is not in [0, k), or the lengths differ.
  """
  answers = np.asarray(answers, np.int64)
  if answers.ndim != 1 or not answers.size or answers.min() < 0 or answers.max() >= num_classes:
    raise KwjaxError(
      f"class_balance: expected one or more classes in [0, {num_classes}), found {answers.tolist()[:20]}"
    )
  if targets is not None and np.shape(targets) != answers.shape:
    raise KwjaxError(f"class_balance: {len(answers)} answers and {len(targets)} targets")
  counts = np.bincount(answers, minlength=num_classes)
  share = counts[counts > 0] / len(answers)
  aimed = None if targets is None else float(np.mean(answers == np.asarray(targets)))
  return ClassBalance(counts, float(np.exp(-np.sum(share * np.log(share)))), aimed)


def class_labels(num_classes: int, names: Sequence[str] | None) -> list[str]:
  """What to call each class: its name, made unique by its index where two share one, or `class I`."""
  if names is None:
    return [f"class {index}" for index in range(num_classes)]
  return [name if names.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(names)]


def images_by_count(counts: Mapping[str, int]) -> dict[str, int]:
  """`{"1 image": classes with one, ...}` ascending, for sets of too many classes to list: the shape of the balance."""
  values = np.bincount(np.asarray(list(counts.values()), np.int64))
  return {f"{count} image{'' if count == 1 else 's'}": int(n) for count, n in enumerate(values) if n}
