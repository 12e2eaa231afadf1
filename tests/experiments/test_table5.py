"""Table 5 at the smallest size: the kernels reach the objective, the measures are what they say."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest

from experiments._harness.study import StudyOptions, choose
from experiments._harness.study_setup import load
from experiments.knowledge_within import table5_sigma
from kwjax.cli.options import sizes
from kwjax.runtime.devices.parallel import device_group
from tests.experiments.tiny_study import command, tiny_network_loaded
from tests.networks import tiny_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
  """A tiny network as the one that is loaded."""
  folder = tmp_path_factory.mktemp("table5")
  with tiny_network_loaded():
    yield folder


@pytest.mark.slow
def test_cells_are_filled(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  columns = ["inception-J_KL", "inception-smoothness", "inception-4w4a*"]
  assert table5_sigma.main(command(folder, "--rows", "9x9-s.7", "--columns", columns[2])) == 2
  assert "--eval-data FILE.npz:test" in capsys.readouterr().err
  assert not (folder / "run").exists()

  assert table5_sigma.main(command(folder, "--rows", "9x9-s.7", "--columns", *columns[:2])) == 0
  cells = json.loads((folder / "run" / "report.json").read_text())["tables"][0]["cells"]
  assert cells["9x9-s.7"]["inception-J_KL"]["mean"] > 0
  assert cells["9x9-s.7"]["inception-smoothness"]["mean"] > 0
  assert cells["9x9-s.7"]["inception-4w4a*"]["mean"] is None
  assert cells["5x5-s1"]["inception-J_KL"]["mean"] is None
  # One set of images serves both columns.
  (stored,) = (folder / "run" / "synthesis").glob("*/images/manifest.json")
  objective = json.loads(stored.read_text())["settings"]["config"]["objective"]
  assert (objective["smoothness"], objective["smoothness_size"], objective["smoothness_sigma"]) == (1.0, 9, 0.7)
  assert (folder / "run" / "figures" / "images.png").exists()


def test_every_row_is_a_kernel_of_its_own() -> None:
  options, network = StudyOptions(preset="cpu"), tiny_network()
  study = table5_sigma.build(load(options, network, device_group(1), sizes(options.main_job(), network)))
  cells, left_out = choose(study, options)
  assert {cell.column for cell in cells} == {f"{s}-{m}" for s in table5_sigma.SCHEMES for m in ("J_KL", "smoothness")}
  assert len(left_out) == 1
  objectives = {
    (cell.row, cell.plan.settings["source"]["config"]["scheme"]): cell.plan.settings["source"]["config"]["objective"]
    for cell in cells
  }
  assert len(objectives) == 5 * 2
  kernels = {
    row: (o["smoothness"] > 0, o["smoothness_size"], o["smoothness_sigma"]) for (row, _), o in objectives.items()
  }
  assert kernels == {
    "none": (False, 5, 1.0),
    "3x3-s1": (True, 3, 1.0),
    "5x5-s1": (True, 5, 1.0),
    "5x5-s.375": (True, 5, 0.375),
    "9x9-s.7": (True, 9, 0.7),
  }
  assert {o["bns"] for (_, scheme), o in objectives.items() if scheme == "inception"} == {0.0}


def test_smoothness_is_the_mean_squared_difference_to_a_blur() -> None:
  images = np.random.default_rng(0).uniform(size=(300, 9, 9, 1)).astype(np.float32)
  x = np.arange(5) - 2
  kernel = np.exp(-(x[:, None] ** 2 + x[None, :] ** 2) / 2)
  kernel /= kernel.sum()
  padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
  blurred = sum(kernel[i, j] * padded[:, i : i + 9, j : j + 9] for i in range(5) for j in range(5))
  source = table5_sigma.Source("inception", {}, "", lambda site, seed: images)
  found = table5_sigma.smoothness_of(source)(None, 0)
  assert found == pytest.approx(np.mean((images - blurred) ** 2), rel=1e-5)
