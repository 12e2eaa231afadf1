"""Table 3 at the smallest size: which layers keep 8 bit by network, the sizes of its sets of images, and a filled cell."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from experiments._harness.quantization_table import ROWS
from experiments._harness.study import Cell, Study, choose
from experiments._harness.study_options import Missing
from experiments._harness.study_setup import load
from experiments.knowledge_within import table3_imagenet
from kwjax.cli.options import sizes
from kwjax.network import Network
from kwjax.runtime.devices.parallel import device_group
from tests.networks import tiny_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Labelled images for the tiny network."""
  folder = tmp_path_factory.mktemp("table3")
  images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
  np.savez(folder / "data.npz", train_images=images[:8], train_labels=np.arange(8) % 3, test_images=images[8:])
  np.savez(folder / "eval.npz", test_images=images[8:], test_labels=np.arange(4) % 3)
  return folder


def planned(folder: pathlib.Path, arch: str, **more: object) -> tuple[Study, list[Cell]]:
  """The study and its chosen cells for a tiny network under an architecture's name."""
  options = table3_imagenet.Options(**{"preset": "smoke", "eval_data": f"{folder / 'eval.npz'}:test", **more})
  network: Network = tiny_network().replace(arch=arch, name=arch)
  chosen = sizes(options.main_job(), network)
  study = table3_imagenet.build(load(options, network, device_group(1), chosen))
  return study, choose(study, options)[0]


@pytest.mark.parametrize(
  ("arch", "four_bit", "rest"),
  [
    ("resnet18", "4w4a*", "first/last 8w8a"),
    ("mobilenet_v2", "4w4a-1x1", "1x1 8w8a"),
    ("densenet121", "4w4a", "weights affine"),
    ("efficientnet_lite0", "4w4a-1x1", "1x1 8w8a"),
    ("resnet50", "4w4a*", "first/last 8w8a"),
  ],
)
def test_layers_that_keep_8_bit_depend_on_the_network(
  folder: pathlib.Path, arch: str, four_bit: str, rest: str
) -> None:
  _, cells = planned(folder, arch, rows=("gaussian",))
  protocols = {cell.column: cell.plan.protocol for cell in cells}
  assert protocols["8w8a"].startswith("8w8a, weights affine")
  for column in (four_bit, f"KD-{four_bit}"):
    assert protocols[column].startswith(f"4w4a, {rest}")
  others = {"4w4a*", "KD-4w4a*"} if arch == "efficientnet_lite0" else set()
  assert set(protocols) == {"8w8a", four_bit, f"KD-{four_bit}"} | others


def test_published_numbers_are_where_they_belong(folder: pathlib.Path) -> None:
  """Haroush et al. (2020), table 3."""
  found = {arch: planned(folder, arch)[0].tables[0].paper for arch in ("resnet18", "mobilenet_v2", "densenet121")}
  assert found["resnet18"]["inception", "4w4a*"] == 38.25
  assert found["resnet18"]["bns", "KD-4w4a*-100"] == 68.14
  assert found["mobilenet_v2"]["gaussian", "KD-4w4a-1x1"] == 36.95
  assert found["densenet121"]["real", "4w4a"] == 45.27
  assert [len(paper) for paper in found.values()] == [20, 15, 15]
  assert not planned(folder, "efficientnet_lite0")[0].tables[0].paper


def test_sets_of_images_by_preset(folder: pathlib.Path) -> None:
  """The tiny network has 3 classes: 10 a class are 30, fewer than the 500 to calibrate with; 200 a class are not."""
  study, cells = planned(folder, "resnet18", preset="paper", rows=("bns",), columns=("KD-4w4a*", "KD-4w4a*-100"))
  classes = tiny_network().num_classes
  counts = {cell.column: cell.plan.settings["source"]["count"] for cell in cells}
  assert counts == {"KD-4w4a*": 500, "KD-4w4a*-100": max(500, 100 * classes)}
  distilled = {cell.column: cell.plan.settings["distillation"]["images"] for cell in cells}
  assert distilled == {"KD-4w4a*": 10 * classes, "KD-4w4a*-100": 100 * classes}
  assert study.tables[0].optional == ("KD-4w4a*-100",)
  study, cells = planned(folder, "resnet18", preset="cpu", rows=("bns",))
  assert [cell.column for cell in cells] == ["8w8a", "4w4a*"]
  assert cells[0].plan.settings["source"]["count"] == 2 * cells[0].plan.settings["source"]["config"]["batch_size"]
  assert study.tables[0].optional == ("KD-4w4a*", "KD-4w4a*-100")
  # Calibration and distillation take their images from one set, so that it is made once.
  given = {"preset": "cpu", "rows": ("bns",), "columns": ("8w8a", "KD-4w4a*"), "distill_images": 700}
  _, cells = planned(folder, "resnet18", **given)
  assert [cell.plan.settings["source"]["count"] for cell in cells] == [700, 700]
  assert cells[1].plan.settings["distillation"]["images"] == 700
  with pytest.raises(Missing, match="needs --preset paper: 100 images for each of"):
    planned(folder, "resnet18", preset="cpu", columns=("KD-4w4a*-100",))


def test_a_row_is_filled(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  network = tiny_network().replace(arch="efficientnet_lite0", name="efficientnet_lite0")
  asked = []

  def loaded(*named: object, default: str | None) -> Network:
    asked.append(default)
    return network

  monkeypatch.setattr("experiments._harness.study.get_network", loaded)
  monkeypatch.setenv("KWJAX_CACHE", str(folder / "cache"))
  workdir = folder / "run"
  arguments = ["--eval-data", f"{folder / 'eval.npz'}:test", "--preset", "smoke", "--devices", "1"]
  chosen = ["--rows", "gaussian", "--columns", "8w8a", "4w4a*", "--workdir", str(workdir)]
  assert table3_imagenet.main([*arguments, *chosen]) == 0
  assert asked == ["efficientnet_lite0"]
  report = json.loads((workdir / "report.json").read_text())
  (table,) = report["tables"]
  assert table["rows"] == list(ROWS)
  measured = {(r, c) for r, row in table["cells"].items() for c, cell in row.items() if cell["seeds"]}
  assert measured == {("gaussian", "8w8a"), ("gaussian", "4w4a*")}
  assert report["float"]["count"] == report["calibrated"]["8w8a"]["gaussian"]["count"] == 4
  assert set(report["distilled"]) == {"4w4a*", "4w4a-1x1"}


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
  with pytest.raises(SystemExit) as stop:
    table3_imagenet.main(["--help"])
  assert stop.value.code == 0
  text = capsys.readouterr().out
  for words in ("--arch resnet18 --weights torchvision", "--real-data", "--distill-images", "-1x1", "69.63"):
    assert words in text
