"""Distillation from noise at the smallest size: cells, their statistics, refusals."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest

from experiments import noise_distill
from tests.networks import tiny_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
  """A tiny network as the one that is loaded, labelled images, and a compilation cache."""
  folder = tmp_path_factory.mktemp("noise_distill")
  images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3)).astype(np.uint8)
  np.savez(folder / "data.npz", test_images=images, test_labels=np.arange(10) % 5)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("KWJAX_CACHE", str(folder / "cache"))
    patch.setattr("experiments.study.get_network", lambda options, default: tiny_network())
    yield folder


def arguments(folder: pathlib.Path, *more: str) -> list[str]:
  given = ["--network", "tiny", "--preset", "smoke", "--devices", "1", "--workdir", str(folder / "run")]
  return [*given, "--eval-data", f"{folder / 'data.npz'}:test", "--pool", "12", *more]


@pytest.mark.slow
def test_cells_are_filled_and_know_their_layers(folder: pathlib.Path) -> None:
  assert noise_distill.main(arguments(folder, "--rows", "dead_leaves", "--running-fractions", "1", "0")) == 0
  table = json.loads((folder / "run" / "report.json").read_text())["tables"][0]
  assert (table["rows"], table["columns"]) == (["gaussian", "dead_leaves"], ["P=1", "P=0"])
  cells = table["cells"]["dead_leaves"]
  assert all(cells[column]["seeds"] == [0] for column in cells)
  assert cells["P=0"]["paper"] == 89.4
  records = [json.loads(path.read_text())["result"] for path in (folder / "run" / "stages").rglob("seed-0.json")]
  layers = sorted(len(record["current"]) for record in records)
  assert layers[0] == 0 and layers[1] > 0
  for record in records:
    assert record["count"] == 10
    assert 0.0 <= record["own"] <= 1.0 and 0.0 <= record["value"] <= 1.0


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--running-fractions", "1.5"], "--running-fractions takes shares in [0, 1], found (1.5,)"),
    (["--pool", "0"], "--pool must be at least 1, found 0"),
    (["--student", "resnet9"], "resnet9"),
  ],
)
def test_bad_options_are_one_sentence(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
  assert noise_distill.main(arguments(folder, *options)) == 2
  errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
  assert len(errors) == 1
  assert message in errors[0]
