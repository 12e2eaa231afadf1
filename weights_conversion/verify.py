"""Compares a state dict with the arrays of a network and reports all differences at once, by the source's names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from kwjax.errors import WeightsError

Shape = tuple[int, ...]


def printable(name: str) -> str:
  """A name from a file, with control characters escaped and its length bounded, safe to show in a terminal."""
  return name.encode("unicode_escape").decode("ascii")[:160]


def natural_order(name: str) -> list[tuple[int, str]]:
  """Sort key that puts `layer1.10` after `layer1.9`."""
  return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"([0-9]+)", name)]


def check_names(expected: Mapping[str, Shape], found: Mapping[str, Shape], origin: str) -> None:
  """Refuse a state dict that lacks arrays, has others, or has arrays of another shape.

  Args:
    expected: shapes by source name, in the source's layout.
    found: shapes by source name.
    origin: name of the weights in the message, for example `resnet.pth as resnet18`.

  Raises:
    WeightsError: one sentence that lists every missing, unexpected and misshapen name with its shapes.
  """
  missing = [f"{printable(name)} {expected[name]}" for name in _sorted(expected) if name not in found]
  unexpected = [f"{printable(name)} {found[name]}" for name in _sorted(found) if name not in expected]
  misshapen = [
    f"{printable(name)} expected {expected[name]} found {found[name]}"
    for name in _sorted(expected)
    if name in found and expected[name] != found[name]
  ]
  parts = [
    f"{len(names)} {kind}: {'; '.join(names)}"
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    if names
  ]
  if parts:
    fits = any(found.get(name) == shape for name, shape in expected.items())
    stranger = "" if fits else " (not one of its arrays does, is it another architecture?)"
    raise WeightsError(f"{origin} does not fit{stranger}: {' | '.join(parts)}")


def _sorted(names: Iterable[str]) -> list[str]:
  return sorted(names, key=natural_order)


def check_values(arrays: Mapping[str, np.ndarray], variances: Sequence[str], origin: str) -> None:
  """Refuse NaN, infinite values and negative variances.

  Args:
    arrays: float32 arrays by source name.
    variances: the names among them that are running variances.
    origin: name of the weights in the message.

  Raises:
    WeightsError: naming every bad array with the number of bad values.
  """
  problems = []
  for name, array in arrays.items():
    bad = int((~np.isfinite(array)).sum())
    if bad:
      problems.append(f"{printable(name)} ({bad} of {array.size} values are NaN or infinite)")
  for name in variances:
    negative = int((arrays[name] < 0).sum())
    if negative:
      problems.append(f"{printable(name)} ({negative} of {arrays[name].size} variances are negative)")
  if problems:
    raise WeightsError(f"{origin} holds unusable values: {'; '.join(problems)}")
