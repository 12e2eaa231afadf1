"""Every table and figure of the paper by its plain command at `--preset smoke`: all cells, and all that a study leaves behind."""

from __future__ import annotations

import csv
import html
import importlib
import json
import pathlib
from collections.abc import Iterator

import pytest

from experiments._harness.results_store import module_of
from tests.experiments.tiny_study import command, tiny_network_loaded, write_answered
from tests.networks import tiny_network

# Which studies take labelled images, and which real ones.
STUDIES = {
  "table1_ablation": ("eval", "real"),
  "table2_cifar": ("eval", "real"),
  "table3_imagenet": ("eval", "real"),
  "table4_similarity": ("named",),
  "table5_sigma": ("eval",),
  "table6_objectives": ("eval", "real"),
  "figure2_monitor": (),
  "figure3_quality": ("eval", "real"),
  "figure5_images": ("real",),
  "figure7_bias": ("real",),
}

# (row, column) of what a plain command leaves empty: measured when it is named, or what the study does not have.
EMPTY = {
  "table4_similarity": {
    ("train", "fitted"),
    *((row, column) for row in ("train", "random", "gaussian", "fgsm") for column in ("fitted-bns", "J_KL-16")),
  },
  "table6_objectives": {(row, f"bns+inception-{loss}") for row in ("4", "8") for loss in ("KL", "CE")},
  "figure5_images": {("bns", "on-target"), ("gaussian", "on-target")},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
  """A tiny network as the one that is loaded, and images with its own answers as labels."""
  folder = tmp_path_factory.mktemp("smoke")
  write_answered(folder / "data.npz")
  with tiny_network_loaded(), pytest.MonkeyPatch.context() as patch:
    patch.setattr("experiments.knowledge_within.similarity_options.load_network", lambda path: tiny_network())
    yield folder / "data.npz"


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_the_plain_command_fills_every_cell(study: str, data: pathlib.Path, tmp_path: pathlib.Path) -> None:
  given = {
    "eval": ["--eval-data", f"{data}:test"],
    "real": ["--real-data", f"{data}:train"],
    "named": ["--networks", "own=tiny", "--data", f"own={data}:test", "--train-data", f"own={data}:train"],
  }
  taken = STUDIES[study]
  arguments = command(tmp_path, *(word for kind in taken for word in given[kind]))
  if "named" in taken:
    del arguments[:2]  # --network
  assert importlib.import_module(module_of(study)).main(arguments) == 0

  folder = tmp_path / "run"
  report = json.loads((folder / "report.json").read_text())
  cells = {
    (table["title"], row, column): cell
    for table in report["tables"]
    for row, columns in table["cells"].items()
    for column, cell in columns.items()
  }
  assert {cell[1:] for cell, found in cells.items() if not found["values"]} == EMPTY.get(study, set())
  assert all(value is not None for found in cells.values() for value in found["values"])
  if "eval" in taken:
    assert report["float"]["count"] == 8
    assert report["float"]["top1"] >= 7 / 8  # the labels are the network's own; 8 bits of the file may move one
  else:
    assert report["float"] is None
  with (folder / "tables.csv").open() as file:
    lines = {(line["table"], line["row"], line["column"]): line for line in csv.DictReader(file)}
  assert {cell: line["mean"] for cell, line in lines.items()} == {
    cell: "" if found["mean"] is None else str(found["mean"]) for cell, found in cells.items()
  }
  page = (folder / "report.html").read_text()
  assert report["tables"][0]["title"] in html.unescape(page)
  figures = list((folder / "figures").glob("*.png"))
  assert figures
  assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)
  assert page.count("data:image/png") >= len(figures)
