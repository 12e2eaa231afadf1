"""The table of ways to calibrate at the smallest size: filled, resumed, and every method a copy of its own."""

from __future__ import annotations

import json
import pathlib

import pytest

from experiments._harness.study import choose
from experiments._harness.study_setup import load
from experiments.calibration import table_calibration
from kwjax.cli.options import Options, method_of, rules_of, sizes
from kwjax.quantization import QuantRules
from kwjax.quantization.methods import BEST, PAPER, Method
from kwjax.runtime.devices.parallel import device_group
from tests.experiments.tiny_study import write_answered
from tests.networks import tiny_network


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Images with the tiny network's own answers as labels."""
  path = tmp_path_factory.mktemp("calibration") / "data.npz"
  write_answered(path)
  return path


def test_cells_are_filled_and_kept(data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  network = tiny_network()
  monkeypatch.setattr("experiments._harness.study.get_network", lambda *named, default: network)
  monkeypatch.setenv("KWJAX_CACHE", str(tmp_path / "cache"))
  arguments = ["--eval-data", f"{data}:test", "--real-data", f"{data}:train", "--preset", "smoke", "--devices", "1"]
  arguments += ["--workdir", str(tmp_path / "run"), "--columns", "real", "--bits", "3w3a"]
  rows = ["paper", "mse+equalized+bias", "mse+weights-mse+moments"]
  assert table_calibration.main([*arguments, "--rows", *rows]) == 0
  report = json.loads((tmp_path / "run" / "report.json").read_text())
  top1, kl = report["tables"]
  assert {row for row, cells in top1["cells"].items() if cells["real"]["seeds"]} == set(rows)
  assert report["calibrated"]["real"]["paper"]["count"] == report["float"]["count"] == 8
  values = [kl["cells"][row]["real"]["mean"] for row in rows]
  assert len(set(values)) == 3
  assert min(values) > 0
  stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "stages").rglob("*.json")}
  assert table_calibration.main([*arguments, "--rows", "paper"]) == 0
  assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_every_cell_has_settings_and_a_protocol_of_its_own(data: pathlib.Path) -> None:
  options = table_calibration.Options(eval_data=f"{data}:test", real_data=f"{data}:train", preset="smoke")
  network = tiny_network()
  setup = load(options, network, device_group(1), sizes(options.main_job(), network))
  cells, left_out = choose(table_calibration.build(setup), options)
  count = 2 * len(table_calibration.METHODS) * len(table_calibration.COLUMNS)
  assert len(cells) == len({cell.folder for cell in cells}) == count
  assert len({cell.plan.protocol for cell in cells}) == count // 2
  assert not left_out
  by_name = {(cell.row, cell.column): cell.plan.protocol for cell in cells}
  assert by_name["mse+weights-mse+moments", "gaussian"].startswith(
    "4w4a, weights affine, weight ranges mse, ranges mse, mean and variance corrected; "
  )


def test_the_main_job_takes_the_best_method_and_the_papers_on_demand() -> None:
  assert method_of(Options()) == BEST
  assert method_of(Options(preset="paper")) == method_of(Options(calibration="paper")) == PAPER
  assert method_of(Options(preset="paper", calibration="best")) == BEST
  changed = Options(calibration="paper", range_method="chunk", weight_range="mse", equalize=True)
  assert method_of(changed) == Method("chunk", "mse", equalizes=True)
  assert method_of(Options(calibration="paper", correction="mean")) == Method(corrects_bias=True)
  none = method_of(Options(correction="none"))
  assert not none.corrects_bias
  assert not none.corrects_variance
  rules = rules_of(Options(calibration="paper"), tiny_network())
  assert rules["4w4a"].describe() == "4w4a, first/last 8w8a, weights affine, ranges sample"


@pytest.mark.parametrize(("bits", "expected"), [("8w4a", "mse"), ("4w8a", "sample"), ("2w32a", "sample")])
def test_the_best_activation_range_depends_on_the_bits(bits: str, expected: str) -> None:
  assert BEST.applied(QuantRules.parse(bits)).ranges == expected
  assert method_of(Options(range_method="entropy")).applied(QuantRules.parse(bits)).ranges == "entropy"


@pytest.mark.parametrize(("bits", "expected"), [("2w4a", "minmax"), ("3w4a", "mse"), ("4w8a", "mse"), ("32w8a", "mse")])
def test_the_best_weight_range_depends_on_the_grid(bits: str, expected: str) -> None:
  assert BEST.applied(QuantRules.parse(bits)).weights_range == expected  # symfull at 2 bits
  assert BEST.applied(QuantRules.parse(bits, weights="integer")).weights_range == "mse"
  assert method_of(Options(weight_range="mse")).applied(QuantRules.parse(bits)).weights_range == "mse"
  assert method_of(Options(calibration="paper")).applied(QuantRules.parse(bits)).weights_range == "minmax"
