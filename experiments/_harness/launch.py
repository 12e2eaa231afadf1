"""Start-up of a command, before JAX is imported."""

from __future__ import annotations

import os
import sys

_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb=1"


def has_huge_pages() -> bool:
  """Whether large blocks of glibc's allocator come on huge pages in this process."""
  return "[always]" in _choice() or ("[madvise]" in _choice() and _HUGE_PAGES in os.environ.get(_TUNABLES, ""))


def _choice() -> str:
  """What the system says of huge pages, the chosen policy in brackets; empty where it says nothing."""
  try:
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
      return file.read()
  except OSError:
    return ""  # not Linux, or not for us to see


def relaunch_with_huge_pages() -> None:
  """Start this process again with glibc's allocator on huge pages, where the system leaves the choice to programs.

  XLA on CPUs asks for its temporary memory anew at every step, gigabytes at ImageNet's size. On pages of 4 kB the kernel
  then spends as long on page faults as the step on arithmetic. The allocator reads its settings at process start only.
  """
  if "[madvise]" not in _choice() or _TUNABLES in os.environ or not sys.orig_argv:
    return
  os.environ[_TUNABLES] = _HUGE_PAGES
  sys.stdout.flush()
  sys.stderr.flush()
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
