"""Where the fast forms get into a network: layers of any Flax module, each as it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from kwjax import intercept
from kwjax.kernels import are_enabled
from kwjax.kernels.convolution import conv_general_dilated
from kwjax.kernels.pooling import max_pool
from kwjax.kernels.windows import Window
from kwjax.models.layers import MaxPool
from kwjax.network import ApplyFn, Array


def accelerated(apply: ApplyFn) -> ApplyFn:
  """Wrap `apply` where `kwjax.kernels` are enabled: layers take their fast forms.

  A convolution that was given a `conv_general_dilated` of its own keeps it.
  """
  if not are_enabled():
    return apply
  apply = intercept.intercept(apply, _has_lax_convolution, _convolve)
  return intercept.intercept(apply, lambda module: isinstance(module, MaxPool), _pool)


def _has_lax_convolution(module: nn.Module) -> bool:
  return isinstance(module, nn.Conv) and module.conv_general_dilated is None and module.conv_general_dilated_cls is None


def _convolve(module: nn.Module, x: Array, proceed: Callable[[Array], Any]) -> Any:
  # A bound module is frozen, and a copy would be another module, which interceptors see too. This one lives for one `apply`.
  object.__setattr__(module, "conv_general_dilated", conv_general_dilated)
  try:
    return proceed(x)
  finally:
    object.__setattr__(module, "conv_general_dilated", None)


def _pool(module: nn.Module, x: Array, proceed: Callable[[Array], Any]) -> Any:
  assert isinstance(module, MaxPool)
  pads = (module.padding, module.padding)
  return max_pool(x, Window((module.size, module.size), (module.stride, module.stride), (pads, pads)))
