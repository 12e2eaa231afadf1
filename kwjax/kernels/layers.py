"""Where the fast forms get into a network: layers and blocks of any Flax module, each as it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kwjax import intercept
from kwjax.kernels import are_enabled
from kwjax.kernels.convolution import conv_general_dilated
from kwjax.kernels.pooling import max_pool
from kwjax.kernels.processor import computed_once
from kwjax.kernels.windows import Window
from kwjax.models.layers import MaxPool
from kwjax.network import ApplyFn, Array


def accelerated(apply: ApplyFn) -> ApplyFn:
  """Wrap `apply` where `kwjax.kernels` are enabled: layers take their fast forms, blocks compute their results once.

  A convolution that was given a `conv_general_dilated` of its own keeps it.
  """
  if not are_enabled():
    return apply
  apply = intercept.intercept(apply, _has_lax_convolution, _convolve)
  apply = intercept.intercept(apply, lambda module: isinstance(module, MaxPool), _pool)
  return intercept.intercept(apply, _is_composite, _once)


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


def _is_composite(module: nn.Module) -> bool:
  return not type(module).__module__.startswith("flax.")


def _once(module: nn.Module, x: Array, proceed: Callable[[Array], Any]) -> Any:
  """Images that a block returns are an array of their own.

  The end of a residual block is read by the next block's end and by its derivative. Each would add up all blocks before it.
  """
  y = proceed(x)
  return computed_once(y) if isinstance(y, jax.Array) and y.ndim == 4 and jnp.issubdtype(y.dtype, jnp.floating) else y
