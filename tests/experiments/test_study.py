"""The frame of the studies: statistics and tables against hand-computed values; what is measured once, apart, or again."""

from __future__ import annotations

import csv
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import pytest

from experiments._harness.image_sets import drawn_images, identity
from experiments._harness.study import CellPlan, Missing, Setup, Study, StudyOptions, run
from experiments._harness.tables import Entry, Table, as_json, as_rows, as_text, over_seeds, write_csv
from kwjax.cli.command import run_command
from kwjax.errors import KwjaxError
from kwjax.runtime.data.images import array_data, load_data
from tests.networks import tiny_network


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
  """Every study gets a network that takes no time to make, and a compilation cache of its own."""
  monkeypatch.setenv("KWJAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr("experiments._harness.study.get_network", lambda *named, default: tiny_network())


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
  """Where a study puts its results."""
  return tmp_path / "run"


def entry(*values: float | None, **more: object) -> Entry:
  return Entry({seed: {"value": value} for seed, value in enumerate(values)}, **more)


TABLE = Table(
  title="Both",
  rows=("one", "two"),
  columns=("top-1", "J_KL"),
  paper={("one", "top-1"): 89.19, ("two", "J_KL"): ".151"},
  unit={"top-1": "%", "J_KL": "nats"},
)
# Mean of 0.89, 0.90, 0.94 is 0.91; deviations -0.02, -0.01, 0.03; sum of squares 0.0014; / 2 = 0.0007; root 0.026458.
RESULTS = {("one", "top-1"): entry(0.89, 0.90, 0.94), ("one", "J_KL"): entry(0.012, 0.012, 0.012)}


def test_statistics_are_the_sample_ones() -> None:
  found = over_seeds(entry(0.89, 0.90, 0.94))
  assert found is not None
  assert found.mean == pytest.approx(0.91)
  assert found.std == pytest.approx(0.0264575131, rel=1e-8)
  assert found.seeds == (0, 1, 2)
  assert over_seeds(Entry({7: {"value": 0.5}})) == (0.5, None, (7,), (0.5,))
  assert over_seeds(Entry({})) is None
  assert over_seeds(None) is None


def test_a_value_that_is_not_finite_is_neither_dropped_nor_averaged() -> None:
  found = over_seeds(entry(0.5, None))
  assert found is not None
  assert (found.mean, found.std) == (None, None)
  assert "not finite (2)" in as_text(TABLE, {("one", "J_KL"): entry(0.5, None)})


def test_text_shows_ours_above_the_papers() -> None:
  lines = as_text(TABLE, RESULTS).splitlines()
  assert lines[2].split() == ["top-1", "(%)", "J_KL", "(nats)"]
  assert lines[3].split() == ["one", "91.00", "±", "2.65", "(3)", "0.01200", "±", "0", "(3)"]
  assert lines[4].split() == ["paper", "89.19"]
  assert lines[5].split() == ["two", "not", "measured", "not", "measured"]
  assert lines[6].split() == ["paper", ".151"]
  assert lines[4].index("89.19") == lines[3].index("91.00")
  assert "seeds 0, 1, 2" in lines[8]


def test_cells_of_different_seeds_name_them() -> None:
  results = {**RESULTS, ("two", "top-1"): Entry({4: {"value": 0.5}})}
  text = as_text(TABLE, results)
  assert "91.00 ± 2.65 (seed 0,1,2)" in text
  assert "50.00 (seed 4)" in text


def test_csv_and_json_and_rows_agree(tmp_path: pathlib.Path) -> None:
  lines = list(csv.DictReader(write_csv(tmp_path / "t.csv", [(TABLE, RESULTS)]).read_text().splitlines()))
  assert [(line["row"], line["column"], line["mean"], line["paper"]) for line in lines] == [
    ("one", "top-1", "91.0", "89.19"),
    ("one", "J_KL", "0.012", ""),
    ("two", "top-1", "", ""),
    ("two", "J_KL", "", ".151"),
  ]
  assert lines[0]["values"] == "89.0 90.0 94.0"
  assert lines[0]["seeds"] == "0 1 2"
  cell = as_json(TABLE, RESULTS)["cells"]["one"]["top-1"]
  assert (cell["mean"], cell["std"], cell["paper"]) == (91.0, pytest.approx(2.645751311), 89.19)
  rows = as_rows(TABLE, RESULTS)
  assert rows[0]["top-1 (%)"] == "91.00 ± 2.65 (3); paper 89.19"
  assert rows[1] == {"": "two", "top-1 (%)": None, "J_KL (nats)": "not measured; paper .151"}


def test_published_numbers_of_absent_cells_are_a_mistake() -> None:
  with pytest.raises(ValueError, match="three"):
    Table(title="t", rows=("one",), columns=("a",), paper={("three", "a"): 1.0})


class Counted:
  """A study of three cells that counts what it computes: value = seed + 10 column; `fixed` has no seed."""

  def __init__(self, failing: str = "") -> None:
    self.calls: list[tuple[str, str, int]] = []
    self.failing = failing

  def __call__(self, setup: Setup) -> Study:
    images = setup.chosen.images

    def plan(table: Table, row: str, column: str) -> CellPlan | None:
      if row == "needy" and setup.options.real_data is None:
        raise Missing("needy rows need --real-data FILE")
      if (row, column) == ("fixed", "b"):
        return None

      def compute(site: object, seed: int) -> Mapping[str, float]:
        if column == self.failing:
          raise KwjaxError("out of order")
        self.calls.append((row, column, seed))
        return {"value": seed + 10.0 * (column == "b"), "images": images}

      return CellPlan({"images": images}, f"{images} images", compute, seeded=row != "fixed")

    table = Table("Counted", ("free", "fixed", "needy"), ("a", "b"), unit="")
    return Study((table,), plan, describe=lambda cells: f"{images} images for {len(cells)}")


def go(study: Counted, folder: pathlib.Path, **more: object) -> int:
  options = StudyOptions(**{"network": pathlib.Path("tiny"), "preset": "smoke", **more}, workdir=folder)
  return run_command(lambda: run(options, name="counted", build=study, arch="resnet44"))


def cells(folder: pathlib.Path) -> dict[str, dict[str, Mapping[str, Sequence[float]]]]:
  return json.loads((folder / "report.json").read_text())["tables"][0]["cells"]


def test_a_second_run_computes_nothing_and_another_seed_joins(folder: pathlib.Path) -> None:
  study = Counted()
  assert go(study, folder) == 0
  assert study.calls == [("free", "a", 0), ("free", "b", 0), ("fixed", "a", 0)]
  assert go(study, folder) == 0
  assert len(study.calls) == 3
  assert go(study, folder, seeds=(2, 5), columns=("b",)) == 0
  assert study.calls[3:] == [("free", "b", 2), ("free", "b", 5)]
  found = cells(folder)
  # 10, 12, 15: mean 37/3, deviations -7/3, -1/3, 8/3, sum of squares 114/9, / 2 = 57/9, root 2.51661.
  assert found["free"]["b"]["mean"] == pytest.approx(37 / 3)
  assert found["free"]["b"]["std"] == pytest.approx(2.516611478)
  assert found["free"]["b"]["seeds"] == [0, 2, 5]
  assert found["free"]["a"]["seeds"] == [0]
  assert found["fixed"]["a"] == {**found["fixed"]["a"], "mean": 0.0, "std": None, "seeds": []}
  assert found["needy"]["a"]["mean"] is None


def test_settings_that_change_a_value_are_kept_apart(folder: pathlib.Path) -> None:
  study = Counted()
  assert go(study, folder) == 0
  assert go(study, folder, preset="cpu", seeds=(1,)) == 0
  assert [seed for _, _, seed in study.calls] == [0, 0, 0, 1, 1, 0]
  assert cells(folder)["free"]["a"]["seeds"] == [1]
  assert go(study, folder, seeds=(1,)) == 0
  assert cells(folder)["free"]["a"]["seeds"] == [0, 1]
  assert len(study.calls) == 8  # seed 1 of the smoke preset; the fixed cell is there


def test_cells_finished_before_an_error_are_kept(folder: pathlib.Path) -> None:
  broken, mended = Counted(failing="b"), Counted()
  assert go(broken, folder) == 2
  assert broken.calls == [("free", "a", 0)]
  assert go(mended, folder) == 0
  assert mended.calls == [("free", "b", 0), ("fixed", "a", 0)]


def test_a_damaged_cell_is_measured_again(folder: pathlib.Path) -> None:
  study = Counted()
  assert go(study, folder) == 0
  (file,) = (folder / "stages" / "cells" / "free" / "a").glob("*/seed-0.json")
  file.write_text(file.read_text().replace('"value": 0', '"value": 1'))
  assert go(study, folder) == 0
  assert study.calls[3:] == [("free", "a", 0)]
  assert cells(folder)["free"]["a"]["mean"] == 0.0


@pytest.mark.parametrize(
  ("more", "message"),
  [
    ({"rows": ("needy",)}, "needy rows need --real-data FILE"),
    ({"rows": ("nobody",)}, "--rows has no 'nobody'; known: free, fixed, needy"),
    ({"columns": ("c",)}, "--columns has no 'c'; known: a, b"),
    ({"seeds": (1, 1)}, "--seeds takes different numbers"),
    ({"network": None}, "python -m weights_conversion --arch resnet44 --source FILE --out FOLDER"),
    ({"eval_data": "nowhere.npz"}, "nowhere.npz"),
  ],
)
def test_mistakes_are_one_sentence_and_status_2(
  folder: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
  more: dict[str, object],
  message: str,
) -> None:
  assert go(Counted(), folder, **more) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ")
  assert message in line
  assert not folder.exists()


def test_another_studys_folder_is_refused(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  assert go(Counted(), folder) == 0
  options = StudyOptions(network=pathlib.Path("tiny"), workdir=folder, preset="smoke")
  assert run_command(lambda: run(options, name="other", build=Counted(), arch="resnet44")) == 2
  assert 'study is "counted" there and "other" now' in capsys.readouterr().err


def test_dry_run_counts_cells_and_does_nothing(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  assert go(Counted(), folder, dry_run=True, seeds=(0, 1)) == 0
  assert "5 cells, 0 of them finished" in capsys.readouterr().out
  assert not folder.exists()


def test_real_images_are_drawn_evenly_over_the_classes() -> None:
  labels = np.array([0] * 20 + [1] * 20 + [2] * 3)
  images = np.broadcast_to(np.arange(43)[:, None, None, None], (43, 2, 2, 3)).astype(np.uint8)
  data = array_data(images, labels)

  def drawn(count: int, seed: int) -> np.ndarray:
    return np.round(drawn_images(data, count, jax.random.key(seed))[:, 0, 0, 0] * 255).astype(int)

  first = drawn(9, 0)
  assert np.bincount(labels[first]).tolist() == [3, 3, 3]
  assert np.bincount(labels[drawn(13, 0)]).tolist() == [5, 5, 3]  # no more of the third class
  assert len(set(drawn(50, 0).tolist())) == 43
  assert set(first) != set(drawn(9, 1))
  np.testing.assert_array_equal(first, drawn(9, 0))


def test_identity_is_of_the_content_not_of_the_place(tmp_path: pathlib.Path) -> None:
  images = np.arange(2 * 4 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 4, 2, 2, 3)
  arrays = {
    "train_images": images[0],
    "train_labels": np.arange(4),
    "test_images": images[1],
    "test_labels": np.arange(4),
  }
  for name in ("here.npz", "there.npz"):
    np.savez(tmp_path / name, **arrays)
  one, other = (identity(load_data(f"{tmp_path / name}:test")) for name in ("here.npz", "there.npz"))
  assert {**one, "file": 0} == {**other, "file": 0}
  assert identity(load_data(f"{tmp_path / 'here.npz'}:train"))["sample"] != one["sample"]
  np.savez(tmp_path / "there.npz", **{**arrays, "test_labels": np.array([0, 1, 2, 2])})
  assert identity(load_data(f"{tmp_path / 'there.npz'}:test"))["sample"] != one["sample"]
