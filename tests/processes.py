"""The environment of the processes that tests start."""

from __future__ import annotations

import os


def environment(devices: int | None = None, **more: str) -> dict[str, str]:
  """This process's environment, with a number of CPU devices of its own and `more` variables.

  Args:
    devices: by default as many as a user has, whatever the tests run on.
    more: variables by name.
  """
  flags = [os.environ["KWJAX_TESTS_XLA_FLAGS"]]
  if devices:
    flags.append(f"--xla_force_host_platform_device_count={devices}")
  return {**os.environ, "XLA_FLAGS": " ".join(filter(None, flags)), **more}
