"""How the memory allocator of a process is set up; the standard library alone, so that it can run before JAX is imported."""

from __future__ import annotations

import ctypes
import os
import sys

_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
_LARGE_BLOCK = 256 << 20  # bytes
_HEAP = 64 << 20  # bytes of a heap, of which glibc makes every arena but the first
_ARENAS = 4


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


def keep_freed_memory() -> None:
  """Tell glibc to keep freed memory for the next step instead of giving it back to the system after each.

  On huge pages the large blocks, a step's temporary memory, are given back all the same: fetching them anew costs next to
  nothing there, and kept in the heap they would break up, until it held half as much again. Several arenas: one alone is left
  full of the holes of compilation, among which every later step searches (702 ms instead of 535 for MobileNetV2's step of
  fine-tuning). Few, because each keeps what was freed in it.
  """
  try:
    mallopt = ctypes.CDLL("libc.so.6").mallopt
  except (OSError, AttributeError):
    return  # another C library
  m_trim_threshold, m_top_pad, m_mmap_threshold, m_mmap_max, m_arena_max = -1, -2, -3, -4, -8
  mallopt(m_trim_threshold, -1)
  # The other arenas grow by heaps, and give an empty one back unless the heap before it lacks room for so much.
  mallopt(m_top_pad, _HEAP)
  mallopt(m_arena_max, _ARENAS)
  gives_back = has_huge_pages() and mallopt(m_mmap_threshold, _LARGE_BLOCK) == 1
  mallopt(m_mmap_max, 65536 if gives_back else 0)
