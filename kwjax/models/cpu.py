"""What the processor can do, where the fastest form of a convolution depends on it."""

from __future__ import annotations

import functools
import pathlib

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
