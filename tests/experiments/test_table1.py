"""Table 1 at the smallest size: the columns differ in IQ and Mix alone, the rows are images a class."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import pytest

from experiments._harness.study import Cell, Study, choose
from experiments._harness.study_setup import load
from experiments._harness.tables import Entry
from experiments.knowledge_within import table1_ablation
from kwjax.cli.options import sizes
from kwjax.runtime.devices.parallel import device_group
from tests.experiments.tiny_study import command, tiny_network_loaded, write_answered
from tests.networks import tiny_network

COLUMNS = ["KD", "KD+IQ", "KD+Mix", "KD+IQ+Mix"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
  """A tiny network as the one that is loaded, and images with its own answers as labels."""
  folder = tmp_path_factory.mktemp("table1")
  write_answered(folder / "data.npz")
  with tiny_network_loaded():
    yield folder


def planned(folder: pathlib.Path, **more: object) -> tuple[Study, list[Cell]]:
  """The study and its chosen cells for some options, as `run` makes them."""
  data = folder / "data.npz"
  options = table1_ablation.Options(**{"eval_data": f"{data}:test", "preset": "smoke", **more})
  network = tiny_network()
  study = table1_ablation.build(load(options, network, device_group(1), sizes(options.main_job(), network)))
  return study, choose(study, options)[0]


def test_columns_differ_in_iq_and_mix_alone(folder: pathlib.Path) -> None:
  study, cells = planned(folder, iq_weight=0.25)
  assert study.tables[0].rows == ("1", "2")
  assert [(cell.row, cell.column) for cell in cells] == [(row, column) for row in ("1", "2") for column in COLUMNS]
  found = {}
  for cell in cells:
    config = dict(cell.plan.settings["distillation"]["config"])
    found[cell.row, cell.column] = config.pop("iq_weight"), config.pop("mixup") is not None
    assert config.pop("iq_reduction") == ("sum" if "IQ" in cell.column else "mean")
    assert config == {
      name: value
      for name, value in cells[0].plan.settings["distillation"]["config"].items()
      if name not in ("iq_weight", "iq_reduction", "mixup")
    }
  for row in ("1", "2"):
    assert [found[row, column] for column in COLUMNS] == [(0.0, False), (0.25, False), (0.0, True), (0.25, True)]
  # Five classes; images come from the network where no real ones are given.
  assert {(c.row, c.plan.settings["source"]["count"]) for c in cells} == {("1", 5), ("2", 10)}
  assert {c.plan.settings["source"]["config"]["scheme"] for c in cells} == {"bns"}
  _, real = planned(folder, real_data=f"{folder / 'data.npz'}:train")
  assert all("data" in cell.plan.settings["source"] for cell in real)


def test_short_runs_have_a_low_rate_and_paper_has_the_published_one(folder: pathlib.Path) -> None:
  _, short = planned(folder, preset="cpu")
  config = short[0].plan.settings["distillation"]["config"]
  assert (config["steps"], config["batch_size"], config["learning_rate"]) == (400, 64, 0.01)
  _, paper = planned(folder, preset="paper", real_data=f"{folder / 'data.npz'}:train")
  config = paper[0].plan.settings["distillation"]["config"]
  assert (config["steps"], config["batch_size"], config["learning_rate"]) == (16_000, 256, 0.1)
  assert {cell.row for cell in paper} == {"1"}  # 16 real images are not 10 a class


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ((0.5, 0.6, 0.7), "KD < KD+IQ < KD+IQ+Mix shows: KD 50.00%, KD+IQ 60.00%, KD+IQ+Mix 70.00%"),
    ((0.5, 0.7, 0.6), "does not show"),
    ((0.5, 0.5, 0.6), "does not show"),
  ],
)
def test_the_ordering_is_judged_by_the_means(values: tuple[float, ...], words: str) -> None:
  columns = ("KD", "KD+IQ", "KD+IQ+Mix")
  results = {
    ("4", column): Entry({0: {"value": value - 0.1}, 1: {"value": value + 0.1}})
    for column, value in zip(columns, values, strict=True)
  }
  text = table1_ablation.ordering(results, "4", 100)
  assert text is not None
  assert words in text
  assert "2 seeds" in text
  assert "5.00%" in text  # sqrt(.5 * .5 / 100)
  del results["4", "KD+IQ"]
  assert table1_ablation.ordering(results, "4", 100) is None


@pytest.mark.slow
def test_cells_are_filled(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  data = folder / "data.npz"
  given = command(folder)
  given += ["--eval-data", f"{data}:test", "--real-data", f"{data}:train", "--rows", "2"]
  assert table1_ablation.main([*given, "--columns", "KD+IQ+Mix"]) == 0
  report = json.loads((folder / "run" / "report.json").read_text())
  cells = report["tables"][0]["cells"]["2"]
  assert [column for column in COLUMNS if cells[column]["seeds"]] == ["KD+IQ+Mix"]
  assert cells["KD+IQ+Mix"]["records"]["0"]["images"] == 10
  (result,) = (found for found in report["distilled"]["2w4a"].values() if found)
  assert result["top1"] * 100 == pytest.approx(cells["KD+IQ+Mix"]["mean"])
  assert report["float"]["count"] == 8
  assert "notes" not in report  # nothing is said of an ordering that was not measured

  assert table1_ablation.main([*given, "--samples", "2", "100", "--rows", "100"]) == 2
  assert "row 100 needs 500 real images" in capsys.readouterr().err
  assert table1_ablation.main([*given, "--iq-weight", "0"]) == 2
  assert "--iq-weight must be positive" in capsys.readouterr().err
