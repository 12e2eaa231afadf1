"""Layers whose class derives from `nn.BatchNorm` and has a `__call__` of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from kwjax.errors import KwjaxError


class _Call:
  """The call of a layer whose class derives from a layer of Flax."""

  def __init__(self, module: nn.Module) -> None:
    self.module, self.is_passed_on = module, False


class _Calls(threading.local):
  """Those that are being traced. One interceptor may answer what another waits for, so all share them."""

  def __init__(self) -> None:
    self.calls: list[_Call] = []


_OPEN = _Calls()


def note_passed_on(module: nn.Module) -> None:
  """Says that BatchNorm's own call of this layer is reached."""
  for call in _OPEN.calls:
    call.is_passed_on |= call.module is module


def passing_on(module: nn.Module, proceed: Callable[[], Any]) -> Any:
  """What the layer's own `__call__` returns.

  Args:
    module: of a subclass of `nn.BatchNorm`.
    proceed: makes the call.

  Raises:
    KwjaxError: it has not called BatchNorm's.
  """
  call = _Call(module)
  _OPEN.calls.append(call)
  try:
    y = proceed()
  finally:
    _OPEN.calls.remove(call)
  if not call.is_passed_on:
    name = "/".join(module.path) or "<top>"
    raise KwjaxError(
      f"layer {name} is a {type(module).__name__}, a BatchNorm with a __call__ of its own that never calls "
      "super().__call__: its statistics cannot be observed (derive it from nn.Module instead)"
    )
  return y
