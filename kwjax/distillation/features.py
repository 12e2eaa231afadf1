"""Outputs of a network's stages: which modules they are, and how to get them out of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn

from kwjax import intercept
from kwjax.errors import KwjaxError
from kwjax.intercept import Forwardable, Layer
from kwjax.network import ApplyFn, Array, Variables

_FEATURES = "features"


def stage_outputs(network: Forwardable) -> tuple[str, ...]:
  """Modules whose outputs are compared by default: the last block of each spatial size, in execution order.

  Blocks are composite modules directly under the top one that return a feature map f32[b,h,w,c]: `layer1_6`,
  `layer2_6`, `layer3_6` of a CIFAR ResNet-44. Empty for a network without such modules.

  Args:
    network: float or quantized.
  """
  last: dict[tuple[int, ...], str] = {}
  for layer in _feature_maps(network):
    if not layer.primitive and "/" not in layer.name:
      last[layer.output_shape[1:3]] = layer.name
  order = [layer.name for layer in _feature_maps(network)]
  return tuple(sorted(last.values(), key=order.index))


def resolve_stages(student: Forwardable, teacher: Forwardable, stages: Sequence[str] | None) -> tuple[str, ...]:
  """The stages to compare: those named, or by default those of `stage_outputs` that both networks have in one shape.

  Raises:
    KwjaxError: a named stage is missing in a network (the message lists what there is) or differs in shape.
  """
  shapes = [{layer.name: layer.output_shape for layer in _feature_maps(network)} for network in (student, teacher)]
  if stages is None:
    return tuple(stage for stage in stage_outputs(teacher) if shapes[0].get(stage) == shapes[1][stage])
  for stage in stages:
    for network, known in zip((student, teacher), shapes, strict=True):
      if stage not in known:
        candidates = ", ".join(stage_outputs(network) or known) or "none"
        raise KwjaxError(
          f"{network.name} has no module {stage!r} that returns a feature map (b, h, w, c); candidates: {candidates}"
        )
    if shapes[0][stage] != shapes[1][stage]:
      raise KwjaxError(
        f"stage {stage} has shape {shapes[1][stage]} in teacher {teacher.name} and {shapes[0][stage]} in student "
        f"{student.name}"
      )
  return tuple(stages)


def _feature_maps(network: Forwardable) -> list[Layer]:
  # A quantized network has the modules of the float network it wraps.
  wrapped: Any = getattr(network, "network", network)
  layers = intercept.layers(wrapped)
  return [layer for layer in layers if len(layer.output_shape) == 4]


def recording_features(apply: ApplyFn, names: Sequence[str]) -> ApplyFn:
  """Wrap `apply`: leave the outputs of the named modules for `recorded_features`; gradients flow through them."""
  chosen = frozenset(names)

  def keep(module: nn.Module, x: Array, proceed: Callable[[Array], Any]) -> Any:
    y = proceed(x)
    intercept.record(module, _FEATURES, y)
    return y

  return intercept.intercept(apply, lambda module: intercept.layer_name(module) in chosen, keep)


def recorded_features(mutated: Variables) -> dict[str, Array]:
  """Outputs that `recording_features` recorded, `{module: f32[b,h,w,c]}`; of a module called twice, the last one."""
  return {name: calls[-1] for name, calls in intercept.collect(mutated, _FEATURES).items()}
