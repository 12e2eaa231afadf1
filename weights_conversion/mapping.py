"""From a PyTorch state dict to Flax variables: names and layouts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from kwjax.errors import WeightsError
from weights_conversion.naming import Path, namings
from weights_conversion.verify import Shape, check_names, check_values

# Flax leaf -> PyTorch leaf. A Flax kernel is a PyTorch weight in another layout, see `to_torch_layout`.
LEAVES = {
  ("params", "kernel"): "weight",
  ("params", "bias"): "bias",
  ("params", "scale"): "weight",
  ("batch_stats", "mean"): "running_mean",
  ("batch_stats", "var"): "running_var",
}
# PyTorch's count of BatchNorm batches; no forward pass uses it.
IGNORED_LEAF = "num_batches_tracked"


class Entry(NamedTuple):
  """One Flax array: its path with the collection (`("params", "conv1", "kernel")`), and its Flax shape."""

  path: Path
  shape: Shape

  @property
  def module(self) -> Path:
    """Path of the module that owns it."""
    return self.path[1:-1]

  @property
  def torch_shape(self) -> Shape:
    """Shape of the PyTorch array: OIHW for a convolution, (out, in) for a linear layer."""
    return tuple(self.shape[axis] for axis in _torch_axes(len(self.shape)))


def _torch_axes(rank: int) -> tuple[int, ...]:
  # HWIO -> OIHW; (in, out) -> (out, in). A depthwise kernel (h, w, 1, c) becomes (c, 1, h, w) by the same rule.
  return (3, 2, 0, 1) if rank == 4 else (1, 0) if rank == 2 else tuple(range(rank))


def to_flax_layout(array: np.ndarray) -> np.ndarray:
  """OIHW -> HWIO, (out, in) -> (in, out), vectors unchanged; a contiguous float32 copy."""
  axes = (2, 3, 1, 0) if array.ndim == 4 else (1, 0) if array.ndim == 2 else tuple(range(array.ndim))
  return np.ascontiguousarray(np.transpose(array, axes), dtype=np.float32)


@functools.lru_cache(maxsize=32)
def flax_entries(arch: str) -> tuple[Entry, ...]:
  """Every array of an architecture with its default number of classes, found by tracing `init`; nothing is computed.

  Raises:
    KwjaxError: the architecture is unknown.
  """
  import flax.traverse_util
  import jax

  from kwjax.models import get_model, model_info

  module = get_model(arch)
  image = jax.ShapeDtypeStruct((1, *model_info(arch).image_shape), np.float32)
  tree = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), image)
  flat = flax.traverse_util.flatten_dict(dict(tree))
  return tuple(Entry(path, tuple(leaf.shape)) for path, leaf in flat.items())


class Plan(NamedTuple):
  """How a state dict becomes the variables of an architecture.

  Attributes:
    naming: which library's names the file uses.
    entries: Flax arrays by source name, with `num_classes` outputs.
    num_classes: outputs of the classifier.
  """

  naming: str
  entries: dict[str, Entry]
  num_classes: int


def make_plan(arch: str, state_dict: Mapping[str, np.ndarray], num_classes: int | None, origin: str) -> Plan:
  """Choose the naming that most names of the file follow, and find the number of classes in the classifier.

  Args:
    arch: name in `kwjax.models`.
    state_dict: arrays by source name.
    num_classes: the required number, or None for the file's.
    origin: name of the weights in messages.

  Raises:
    WeightsError: the classifier has another number of classes than asked for.
  """
  entries, shapes = flax_entries(arch), _shapes(state_dict)
  candidates = {
    name: {f"{rule(entry.module)}.{LEAVES[entry.path[0], entry.path[-1]]}": entry for entry in entries}
    for name, rule in namings(arch, [entry.module for entry in entries]).items()
  }
  naming = max(candidates, key=lambda name: len(candidates[name].keys() & shapes.keys()))
  named = candidates[naming]
  classifier = next(name for name, entry in named.items() if len(entry.shape) == 2)
  default = named[classifier].shape[1]
  shape = shapes.get(classifier, ())
  found = shape[0] if len(shape) == 2 else default
  if num_classes is not None and len(shape) == 2 and found != num_classes:
    raise WeightsError(f"{origin} has {found} classes ({classifier} is {shape}), {num_classes} were asked for")
  wanted = found if num_classes is None else num_classes
  head = named[classifier].module
  resized = {
    name: entry._replace(shape=(*entry.shape[:-1], wanted)) if entry.module == head else entry
    for name, entry in named.items()
  }
  return Plan(naming, resized, wanted)


def to_flax(
  arch: str, state_dict: Mapping[str, np.ndarray], num_classes: int | None = None, *, origin: str = "the state dict"
) -> dict[str, Any]:
  """Flax variables of `arch` from a PyTorch state dict.

  Convolutions go from OIHW to HWIO, linear layers from (out, in) to (in, out); BatchNorm's weight, bias, running_mean
  and running_var become scale, bias, mean and var unchanged (PyTorch's running variance is the unbiased estimate);
  `num_batches_tracked` is dropped. torchvision, timm and the original CIFAR names are recognised.

  Args:
    arch: name in `kwjax.models`, for example `resnet20`.
    state_dict: arrays by PyTorch name, without a `module.` prefix.
    num_classes: outputs of the classifier; None: the file's.
    origin: name of the weights in messages.

  Returns: `{"params": ..., "batch_stats": ...}`, nested dicts of float32 arrays.

  Raises:
    WeightsError: names or shapes differ (all are listed), or values are NaN, infinite or negative variances.
    KwjaxError: the architecture is unknown.
  """
  from kwjax.models import model_info

  return apply_plan(make_plan(model_info(arch).name, state_dict, num_classes, origin), state_dict, origin)


def _shapes(state_dict: Mapping[str, np.ndarray]) -> dict[str, Shape]:
  return {name: tuple(a.shape) for name, a in state_dict.items() if name.rpartition(".")[2] != IGNORED_LEAF}


def apply_plan(chosen: Plan, state_dict: Mapping[str, np.ndarray], origin: str) -> dict[str, Any]:
  """Carry out a plan on the arrays it was made for; see `to_flax`."""
  import flax.traverse_util

  check_names({name: entry.torch_shape for name, entry in chosen.entries.items()}, _shapes(state_dict), origin)
  not_real = [name for name in chosen.entries if state_dict[name].dtype.kind not in "fiu"]
  if not_real:
    raise WeightsError(f"{origin} has weights that are no real numbers: {', '.join(not_real)}")
  with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused below
    arrays = {name: np.asarray(state_dict[name]).astype(np.float32) for name in chosen.entries}
  variances = [
    name for name, entry in chosen.entries.items() if entry.path[0] == "batch_stats" and entry.path[-1] == "var"
  ]
  check_values(arrays, variances, origin)
  flat = {entry.path: to_flax_layout(arrays[name]) for name, entry in chosen.entries.items()}
  return flax.traverse_util.unflatten_dict(flat)
