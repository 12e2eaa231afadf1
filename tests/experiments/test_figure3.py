"""Figure 3 at the smallest size: snapshots are one synthesis stopped on its way, and cells are filled."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from experiments._harness.study import Setup, choose
from experiments._harness.study_setup import load
from experiments._harness.tables import Entry
from experiments.knowledge_within import figure3_quality
from kwjax.analysis.similarity import measure
from kwjax.cli.options import sizes
from kwjax.runtime.devices.parallel import device_group
from kwjax.synthesis.store import ImageStore
from tests.experiments.tiny_study import command, tiny_network_loaded, write_noise
from tests.networks import tiny_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
  """A tiny network as the one that is loaded, and labelled images."""
  folder = tmp_path_factory.mktemp("figure3")
  write_noise(folder / "data.npz", "train", "test")
  with tiny_network_loaded():
    yield folder


def setup_of(**given: object) -> Setup:
  """What `run` makes of some options."""
  options, network = figure3_quality.Options(**given), tiny_network()
  return load(options, network, device_group(1), sizes(options.main_job(), network))


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_a_snapshot_is_the_longer_synthesis_on_its_way(preset: str) -> None:
  setup = setup_of(preset=preset)
  short, long = (figure3_quality.stopped_after(setup, step) for step in (30, 1000))
  assert (short.steps, long.steps) == (30, 1000)
  assert short.replace(steps=0) == long.replace(steps=0)
  rates = [[float(config.learning_rate_at()(step)) for step in (0, 10, 29)] for config in (short, long)]
  assert rates[0] == rates[1]
  if preset == "paper":
    assert float(long.learning_rate_at()(900)) == pytest.approx(0.01)


def test_long_cells_are_measured_on_demand(folder: pathlib.Path) -> None:
  def cells(**given: object) -> set[tuple[str, str]]:
    setup = setup_of(eval_data=f"{folder / 'data.npz'}:test", **given)
    return {(cell.row, cell.column) for cell in choose(figure3_quality.build(setup), setup.options)[0]}

  steps = [f"step-{n}" for n in (0, 5, 10, 20, 40, 80, 160)]
  found = cells(preset="cpu")
  assert found == {
    *((row, column) for row in steps for column in ("J_KL", "4w4a")),
    *((f"{n}-images", "KD-bns") for n in (32, 128, 384)),
  }
  assert cells(preset="cpu", columns=("KD",)) == {(row, "KD") for row in steps}
  assert ("step-1000", "KD") in cells(preset="paper")


def test_the_rank_correlation_shares_the_ranks_of_ties() -> None:
  jkl, top1 = [0.4, 0.2, 0.2, 0.05, 0.01], [0.5, 0.7, 0.6, 0.7, 0.9]
  results = {}
  for number, (x, y) in enumerate(zip(jkl, top1, strict=True)):
    results[f"step-{number}", "J_KL"] = Entry({0: {"value": x}})
    results[f"step-{number}", "4w4a"] = Entry({0: {"value": y}})
  results["step-9", "J_KL"] = Entry({0: {"value": 5.0}})  # without an accuracy
  results["step-9", "4w4a"] = Entry({})
  value, count = figure3_quality.correlation_with_jkl(results, "4w4a")
  assert count == 5
  # Ranks 5, 3.5, 3.5, 2, 1 and 1, 3.5, 2, 3.5, 5, less their mean 3.
  assert value == pytest.approx(-8.75 / 9.5)
  assert figure3_quality.correlation_with_jkl(results, "KD") == (None, 0)


@pytest.mark.slow
def test_cells_are_filled(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  distilled_on = []

  def distill(student: Any, teacher: Any, images: np.ndarray, config: Any, **more: Any) -> Any:
    distilled_on.append((len(images), config.steps))
    return student, []

  monkeypatch.setattr(
    "kwjax.compression.student.distill_with_history", distill
  )  # covered by other tests, and slow to compile
  given = command(folder)
  assert figure3_quality.main([*given, "--columns", "KD"]) == 2
  assert "--eval-data FILE.npz:test" in capsys.readouterr().err

  data = str(folder / "data.npz")
  chosen = ["--rows", "step-0", "step-2", "4-images", "--columns", "J_KL", "KD-real"]
  assert figure3_quality.main([*given, "--eval-data", f"{data}:test", "--real-data", f"{data}:train", *chosen]) == 0
  assert distilled_on == [(4, 2)]
  report = json.loads((folder / "run" / "report.json").read_text())
  by_number, by_quality = (table["cells"] for table in report["tables"])
  assert by_number["4-images"]["KD-real"]["records"]["0"]["images"] == 4
  assert by_number["8-images"]["KD-real"]["mean"] is None
  assert report["distilled"]["2w4a"]["4-images, real"]["count"] == 10
  assert report["rank_correlation_with_jkl"] == {"4w4a": None, "KD": None}
  assert (folder / "run" / "figures" / "quality.png").exists()
  # J_KL is that of the stored images, measured here.
  stores = {settings["config"]["steps"]: (path, settings) for path, settings in snapshots(folder)}
  assert sorted(stores) == [0, 2]
  for step, (path, settings) in stores.items():
    images = ImageStore(path, settings=settings).images().images
    expected = float(measure(tiny_network(), images, include_input=True).jkl)
    assert by_quality[f"step-{step}"]["J_KL"]["mean"] == pytest.approx(expected, rel=1e-4)


def snapshots(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, dict[str, Any]]]:
  """Folder and settings of the sets of eight images that were made."""
  for path in (folder / "run" / "synthesis").glob("*/images/manifest.json"):
    settings = json.loads(path.read_text())["settings"]
    if settings["batches"] == [8]:
      yield path.parent, settings
