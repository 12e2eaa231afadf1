"""What is particular to CPUs: what the processor can do, and what XLA does for it."""

from __future__ import annotations

import functools
import pathlib

import jax.numpy as jnp
from jax import Array

_CPUINFO = pathlib.Path("/proc/cpuinfo")


@functools.cache
def has_wide_vectors() -> bool:
  """Whether the host's processor has AVX-512, with which XLA's direct convolutions run at three times the rate of AVX2.

  What saves multiplications and costs memory traffic pays later then. Only speed depends on the answer, which is no where the
  system does not tell.
  """
  try:
    with _CPUINFO.open() as lines:
      flags = next((line for line in lines if line.startswith("flags")), "")
  except OSError:
    return False
  return "avx512f" in flags.split()


def computed_once(x: Array) -> Array:
  """The array x, f32[...] or other floats, as one that a program holds rather than computes anew for each use; NaN stays NaN.

  XLA's CPU backend fuses what has one large operand, as a BatchNorm and its activation do, into each of its uses: beside the
  layer itself whatever is observed of its input, and a depthwise convolution before them is run as often. A choice between
  two arrays has two large operands, and is stored; a barrier is gone before that is decided. Not a promise: a sum of many
  terms may still be computed twice.
  """
  # True but for NaN, which cannot be ruled out.
  return jnp.where(x == x, x, jnp.nan)
