"""One undisturbed run to compare with, and the inputs and compiled programs that all runs share."""

from __future__ import annotations

import os
import pathlib
from typing import Any, NamedTuple

import filelock
import pytest

from tests.end_to_end import jobs


class Undisturbed(NamedTuple):
  """A finished run that nothing happened to.

  Attributes:
    inputs: folder of its network and its data, and of the programs that it compiled.
    workdir: its folder.
    result: what it made; see `jobs.result`.
  """

  inputs: pathlib.Path
  workdir: pathlib.Path
  result: dict[str, Any]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
  """A run from start to end in a process of its own; the first of several workers makes it, the others wait for it."""
  base = tmp_path_factory.getbasetemp()
  folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "undisturbed"
  with filelock.FileLock(f"{folder}.lock"):
    if not (folder / "run" / "report.json").exists():
      jobs.save_inputs(folder)
      process = jobs.Process(folder, folder / "run", folder / "log")
      assert process.wait() == 0, process.said()
  made = jobs.result(folder / "run")
  kinds = {name.partition("/")[0] for name in made}
  assert kinds == {"synthesis", "gaussian", "stages", "quantized"}
  return Undisturbed(folder, folder / "run", made)
