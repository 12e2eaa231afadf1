"""Fast forms of convolutions for CPUs, put into the layers of any Flax module by interception, behind one switch.

`Network.forward` takes them where a program is compiled for CPUs. They change the time that a step takes, and its results by
rounding errors alone. Switched off, or on another platform, the program holds the convolutions of `lax` and no trace of them.

- Environment `KWJAX_CPU_KERNELS`: `auto`, the default, or `off`. It is read once, at the first forward pass.
- `with kwjax.kernels.enabled(False):` switches them off for what is called inside, `enabled(True)` on. `jax.jit` knows of it: a
  function that was compiled before is compiled anew.

"CPU" is the platform of `jax.default_device`, or else of `jax.default_backend()`, when a function is traced. Where something is
placed on another platform than that one, results are right and a step is slower. The fast forms are differentiated in reverse
mode only; `jax.jvp` needs them switched off.
"""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager
from typing import Any

import jax

from kwjax.errors import KwjaxError

VARIABLE = "KWJAX_CPU_KERNELS"

_USE: Any = jax.make_user_context(None)

_FEWER_PRODUCTS: Any = jax.make_user_context(False)


def enabled(use: bool) -> AbstractContextManager[None]:
  """A context in which forward passes take the fast forms (True), whatever the platform, or never do (False)."""
  return _USE(bool(use))


def fewer_products() -> AbstractContextManager[None]:
  """Inside, wide 3x3 convolutions are Winograd's where that pays: up to twice as fast, and rounded ten times as much.

  Errors are about 1e-5 of a layer's largest output, a hundredth of those of the TF32 that GPUs multiply in by default. For
  work that averages over images or takes small steps; what a network answers is computed without it. A convolution with
  another precision than None stays exact.
  """
  return _FEWER_PRODUCTS(True)


def takes_fewer_products() -> bool:
  """Whether a convolution that is traced now lies in `fewer_products`."""
  return _FEWER_PRODUCTS.value


def are_enabled() -> bool:
  """Whether a forward pass that is traced now takes the fast forms.

  Raises:
    KwjaxError: the environment asks for something else than `auto` and `off`.
  """
  if _USE.value is not None:
    return _USE.value
  return _asked_for() == "auto" and _platform() == "cpu"


@functools.cache
def _asked_for() -> str:
  found = os.environ.get(VARIABLE, "auto")
  if found not in ("auto", "off"):
    raise KwjaxError(f"{VARIABLE} must be auto or off, found {found!r}")
  return found


def _platform() -> str:
  device = jax.config.jax_default_device  # type: ignore[attr-defined]  # JAX makes it at run time
  if device is None:
    return jax.default_backend()
  return device if isinstance(device, str) else device.platform
