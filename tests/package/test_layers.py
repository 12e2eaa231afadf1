"""Imports run one way: what is below knows nothing of what is above it."""

from __future__ import annotations

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
STAGES = {
  "batchnorm",
  "synthesis",
  "sources",
  "distillation",
  "training",
  "quantization",
  "reconstruction",
  "analysis",
  "export",
}
MAIN_JOB = {"compression", "cli"}


def imported(path: pathlib.Path) -> set[str]:
  """Full names of the modules that a file imports, wherever in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
  return found


@pytest.mark.parametrize(
  ("folder", "above"),
  [
    ("models", STAGES | MAIN_JOB | {"runtime"}),
    ("kernels", STAGES | MAIN_JOB | {"runtime"}),
    ("runtime", (STAGES - {"analysis"}) | MAIN_JOB),  # the report counts classes with it
    *((stage, MAIN_JOB) for stage in sorted(STAGES)),
    ("compression", {"cli"}),
  ],
)
def test_imports_run_one_way(folder: str, above: set[str]) -> None:
  for path in (ROOT / "kwjax" / folder).rglob("*.py"):
    wrong = {name for name in imported(path) if name.startswith("kwjax.") and name.split(".")[1] in above}
    assert not wrong, f"{path} imports {wrong}"


@pytest.mark.parametrize("package", ["kwjax", "weights_conversion"])
def test_the_wheel_needs_nothing_of_the_repository(package: str) -> None:
  for path in (ROOT / package).rglob("*.py"):
    assert not {name for name in imported(path) if name.split(".")[0] in ("experiments", "benchmarks", "tests")}, path
