"""What the numbers of this installation depend on."""

from __future__ import annotations

from kwjax.runtime.reporting.report import versions

_PACKAGES = ("jax", "jaxlib", "flax")


def version_text() -> str:
  """Versions of kwjax, what it computes with and Python, and the devices, a line each."""
  found = versions()
  lines = [f"kwjax {found['kwjax']}", *(f"{name} {found[name]}" for name in _PACKAGES), f"python {found['python']}"]
  return "\n".join([*lines, f"devices {found['devices']} x {found['device']} ({found['backend']})"])
