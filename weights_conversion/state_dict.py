"""Finds the state dict inside a checkpoint, under any keys that a training script adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kwjax.errors import WeightsError
from weights_conversion.tensors import TensorView

# Keys under which training scripts keep the weights, in order of preference; averaged weights last.
NESTED_KEYS = (
  "state_dict",
  "model_state_dict",
  "model",
  "net",
  "network",
  "module",
  "weights",
  "params",
  "state_dict_ema",
  "model_ema",
  "ema",
  "ema_state_dict",
)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")


def find_state_dict(data: Any) -> tuple[dict[str, TensorView], tuple[str, ...]]:
  """The tensors of a checkpoint and the keys that led to them.

  Args:
    data: content of the pickle: the state dict, or a dict that holds it under a usual or a single key.

  Raises:
    WeightsError: there is no state dict, more than one candidate, or an entry of it is no tensor.
  """
  found = _search(data, (), 4)
  if found is None:
    keys = ", ".join(repr(key)[:60] for key in list(data)[:8]) if isinstance(data, dict) else type(data).__name__
    raise WeightsError(f"it holds no state dict: no tensors by name were found (top level: {keys or 'an empty dict'})")
  state, nested = found
  wrong = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, TensorView)]
  if wrong:
    shown = ", ".join(f"{key!r} ({type(state[key]).__name__})"[:80] for key in wrong[:8])
    raise WeightsError(f"these entries of its state dict are no tensors: {shown}")
  return state, nested


def _search(data: Any, nested: tuple[str, ...], depth: int) -> tuple[dict[Any, Any], tuple[str, ...]] | None:
  if not isinstance(data, dict) or depth == 0:
    return None
  for key in NESTED_KEYS:
    found = _search(data.get(key), (*nested, key), depth - 1)
    if found:
      return found
  if any(isinstance(value, TensorView) for value in data.values()):
    return data, nested
  others = [key for key, value in data.items() if isinstance(key, str) and _has_tensors(value)]
  if len(others) > 1:
    raise WeightsError(f"it holds several state dicts, under {', '.join(map(repr, others[:8]))}: save only one")
  return (data[others[0]], (*nested, others[0])) if others else None


def _has_tensors(value: Any) -> bool:
  return isinstance(value, dict) and any(
    isinstance(key, str) and isinstance(item, TensorView) for key, item in value.items()
  )


def strip_prefixes(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
  """Remove the prefix that DataParallel, torch.compile and wrappers add to every name; also returns the prefix."""
  kept = {name: value for name, value in arrays.items() if name != "n_averaged"}  # a counter of AveragedModel
  removed = ""
  while kept:
    prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in kept)), None)
    if prefix is None:
      break
    kept = {name[len(prefix) :]: value for name, value in kept.items()}
    removed += prefix
  return kept, removed
