"""The table of steps towards few bits at the smallest size: filled, resumed, one reconstruction for the rows that share it."""

from __future__ import annotations

import json
import pathlib

import pytest

from experiments._harness.study import choose
from experiments._harness.study_setup import load
from experiments.calibration import table_reconstruction
from kwjax.cli.options import sizes
from kwjax.compression import student
from kwjax.errors import KwjaxError
from kwjax.runtime.devices.parallel import device_group
from tests.experiments.tiny_study import write_answered
from tests.networks import tiny_network


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Images with the tiny network's own answers as labels."""
  path = tmp_path_factory.mktemp("reconstruction") / "data.npz"
  write_answered(path)
  return path


def test_rows_that_share_a_reconstruction_make_it_once(
  data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  network, units = tiny_network(), []

  def counted(*given: object, **options: object) -> object:
    made, reports = original(*given, **options)  # type: ignore[arg-type]
    units.append([report.seconds for report in reports])
    return made, reports

  original = student.reconstructed
  monkeypatch.setattr(student, "reconstructed", counted)
  monkeypatch.setattr("experiments._harness.study.get_network", lambda *named, default: network)
  monkeypatch.setenv("KWJAX_CACHE", str(tmp_path / "cache"))
  arguments = ["--eval-data", f"{data}:test", "--real-data", f"{data}:train", "--preset", "smoke", "--devices", "1"]
  arguments += ["--workdir", str(tmp_path / "run"), "--columns", "real", "--bits", "2w4a", "--first-last", "none"]
  rows = ["ranges", "moments", "reconstructed", "reconstructed+means"]
  assert table_reconstruction.main([*arguments, "--rows", *rows, "--reconstruct-iterations", "40"]) == 0
  report = json.loads((tmp_path / "run" / "report.json").read_text())
  kl = report["tables"][1]["cells"]
  assert {row for row, cells in kl.items() if cells["real"]["seeds"]} == set(rows)
  values = {row: kl[row]["real"]["mean"] for row in rows}
  assert len(set(values.values())) == 4
  assert values["reconstructed"] < values["ranges"]
  assert len(units) == 2
  assert units[0] == units[1], "the second goes on from the first's folder"


def test_every_cell_has_settings_of_its_own(data: pathlib.Path) -> None:
  options = table_reconstruction.Options(eval_data=f"{data}:test", real_data=f"{data}:train", preset="smoke")
  network = tiny_network()
  setup = load(options, network, device_group(1), sizes(options.main_job(), network))
  study = table_reconstruction.build(setup)
  cells, left_out = choose(study, options)
  count = 2 * len(table_reconstruction.STEPS) * len(table_reconstruction.COLUMNS)
  assert len({cell.folder for cell in cells}) == len(cells) == count
  assert len({cell.plan.protocol for cell in cells}) == count // 2
  assert not left_out
  assert "12 reconstructions" not in study.describe(cells)
  assert "4 reconstructions of 2 iterations" in study.describe(cells)


def test_a_bad_override_is_refused(data: pathlib.Path) -> None:
  options = table_reconstruction.Options(eval_data=f"{data}:test", preset="smoke", overrides=("1x1",))
  setup = load(options, tiny_network(), device_group(1), sizes(options.main_job(), tiny_network()))
  with pytest.raises(KwjaxError, match=r"--overrides takes PATTERN=BITS such as 1x1=8w8a, found '1x1'"):
    table_reconstruction.build(setup)
