"""Where the fast forms get into a network: the convolutions of any Flax module, each as it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kwjax import intercept
from kwjax.kernels import are_enabled
from kwjax.kernels.convolution import conv_general_dilated
from kwjax.network import ApplyFn, Array


def accelerated(apply: ApplyFn) -> ApplyFn:
  """Wrap `apply`: every `nn.Conv` takes its fast form where `kwjax.kernels` are enabled; otherwise `apply` itself.

  A layer that was given a convolution of its own keeps it.
  """
  if not are_enabled():
    return apply
  from kwjax.kernels.dense import ABLATED
  apply = intercept.intercept(apply, _has_lax_convolution, _convolve)
  if "outputs" in ABLATED:
    return apply
  return intercept.intercept(apply, _is_composite, _store)


def _is_composite(module: nn.Module) -> bool:
  return not type(module).__module__.startswith("flax.")


def _store(module: nn.Module, x: Array, proceed: Callable[[Array], Any]) -> Any:
  from kwjax.kernels.processor import computed_once
  y = proceed(x)
  is_images = isinstance(y, jax.Array) and y.ndim == 4 and jnp.issubdtype(y.dtype, jnp.floating)
  return computed_once(y) if is_images else y


def _has_lax_convolution(module: nn.Module) -> bool:
  return isinstance(module, nn.Conv) and module.conv_general_dilated is None and module.conv_general_dilated_cls is None


def _convolve(module: nn.Module, x: Array, proceed: Callable[[Array], Any]) -> Any:
  # A bound module is frozen, and a copy of it would be another module: interceptors would see both. This one lives for one
  # call of `apply`.
  object.__setattr__(module, "conv_general_dilated", conv_general_dilated)
  try:
    return proceed(x)
  finally:
    object.__setattr__(module, "conv_general_dilated", None)
