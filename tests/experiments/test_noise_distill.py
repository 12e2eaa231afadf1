"""Distillation from noise at the smallest size: cells, their statistics, their settings, refusals."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from experiments._harness.study import choose
from experiments._harness.study_setup import load
from experiments._harness.tables import Entry
from experiments.noise import distill as noise_distill
from experiments.noise.distill import Options
from experiments.noise.student import Recipe, current_top1
from kwjax.cli.options import sizes
from kwjax.compression.workspace import Workspace
from kwjax.errors import KwjaxError
from kwjax.runtime.data import load_data
from kwjax.runtime.devices.parallel import device_group
from kwjax.runtime.result_store import ResultStore
from kwjax.sources import FreshNoise
from tests.experiments.tiny_study import command, tiny_network_loaded, write_noise
from tests.networks import tiny_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
  """A tiny network as the one that is loaded, and labelled images."""
  folder = tmp_path_factory.mktemp("noise_distill")
  write_noise(folder / "data.npz", "test")
  with tiny_network_loaded():
    yield folder


def arguments(folder: pathlib.Path, *more: str) -> list[str]:
  return command(folder, "--eval-data", f"{folder / 'data.npz'}:test", *more)


def site_of(folder: pathlib.Path) -> Workspace:
  return Workspace(tiny_network(), device_group(1), ResultStore(folder, {"study": "x"}), scratch=folder / "scratch")


def recipe(folder: pathlib.Path, row: str, column: str, **options: Any) -> Recipe:
  given = Options(**{"preset": "smoke", "eval_data": f"{folder / 'data.npz'}:test", **options})
  setup = load(given, tiny_network(), device_group(1), sizes(given.main_job(), tiny_network()))
  study = noise_distill.build(setup)
  plan = study.plan(study.tables[column.startswith("B")], row, column)
  assert plan is not None
  made: Recipe = plan.compute.__self__  # type: ignore[attr-defined]
  assert plan.settings == made.settings
  return made


@pytest.mark.slow
def test_cells_are_filled_and_one_student_serves_every_evaluation(folder: pathlib.Path) -> None:
  chosen = ["--rows", "gaussian", "--running-fractions", "1", "0.5", "--pool", "12"]
  assert noise_distill.main(arguments(folder, *chosen)) == 0
  report = json.loads((folder / "run" / "report.json").read_text())
  table, by_batch = report["tables"]
  assert (table["rows"], table["columns"]) == (["gaussian", "dead_leaves"], ["P=1", "P=0.5"])
  cells = table["cells"]["gaussian"]
  assert all(cell["seeds"] == [0] for cell in cells.values())
  assert cells["P=1"]["paper"] is None, "published of another student"
  assert by_batch["cells"]["dead_leaves"]["B=32"]["mean"] is None
  records = {column: cell["records"]["0"] for column, cell in cells.items()}
  assert [len(records[column]["layers"]) for column in ("P=1", "P=0.5")] == [0, 1]
  for record in records.values():
    assert (record["count"], record["value"]) == (10, record["adjusted"])

  students = folder / "run" / "stages" / "students"
  before = sorted(students.rglob("seed-0.json"))
  assert len(before) == 2
  assert noise_distill.main(arguments(folder, *chosen, "--evaluation", "own")) == 0
  assert sorted(students.rglob("seed-0.json")) == before
  (table, _) = json.loads((folder / "run" / "report.json").read_text())["tables"]
  assert all(
    table["cells"]["gaussian"][column]["records"]["0"]["value"] == records[column]["own"] for column in records
  )


@pytest.mark.slow
def test_fresh_noise_and_other_batch_sizes(folder: pathlib.Path) -> None:
  chosen = ["--rows", "gaussian", "--columns", "B=32", "--fresh", "--optimizer", "sgd", "--schedule", "plateau"]
  assert noise_distill.main(arguments(folder, *chosen, "--plateau-steps", "4", "--temperature", "2")) == 0
  cell = json.loads((folder / "run" / "report.json").read_text())["tables"][1]["cells"]["gaussian"]["B=32"]
  assert "1 steps of 32 from gaussian images in normalized space drawn anew at every step, sgd 0.1" in cell["protocol"]
  assert "plateau of the loss (10 x 1 steps), temperature 2; teacher" in cell["protocol"]
  assert 0.0 <= cell["records"]["0"]["value"] <= 1.0


def test_columns_by_batch_size_cost_equally_many_images(folder: pathlib.Path) -> None:
  for batch in noise_distill.BATCH_SIZES:
    config = recipe(folder, "dead_leaves", f"B={batch}", preset="paper").config
    assert config.batch_size == batch
    assert config.steps * batch == 39_200 * 256
    assert config.plateau_steps * batch == 196 * 256
    assert config.schedule == "plateau"
  one, other = recipe(folder, "dead_leaves", "P=0"), recipe(folder, "dead_leaves", "B=32", distill_batch_size=32)
  assert one.running_fraction == other.running_fraction == 0.0
  same = recipe(folder, "dead_leaves", "P=0", distill_batch_size=32)
  assert same.settings == other.settings, "a student of both tables is trained once"


def test_batch_sizes_are_measured_only_where_they_are_named(folder: pathlib.Path) -> None:
  def columns(*named: str) -> set[str]:
    given = Options(preset="smoke", eval_data=f"{folder / 'data.npz'}:test", columns=named)
    setup = load(given, tiny_network(), device_group(1), sizes(given.main_job(), tiny_network()))
    return {cell.column for cell in choose(noise_distill.build(setup), given)[0]}

  assert columns() == {"P=1", "P=0"}
  assert columns("B=64", "P=0") == {"B=64", "P=0"}


def test_published_numbers_stand_beside_their_own_student() -> None:
  shares, batches = noise_distill.tables_of(Options(student="resnet18_cifar"), "net")
  assert (shares.paper["gaussian", "P=1"], shares.paper["dead_leaves", "P=0"]) == (13.49, 89.4)
  assert batches.paper["dead_leaves", "B=512"] == 89.19
  shares, batches = noise_distill.tables_of(Options(student="wrn28_10"), "net")
  assert shares.paper == {("gaussian", "P=0"): 88.12, ("dead_leaves", "P=0"): 90.75}
  assert not batches.paper


def test_three_shares_are_a_curve(folder: pathlib.Path) -> None:
  tables = noise_distill.tables_of(Options(running_fractions=(1.0, 0.25, 0.0)), "net")
  values = {"P=1": (0.1, 0.2), "P=0.25": (0.5,), "P=0": (0.8, 0.9)}
  found: dict[tuple[str, str], Entry] = {
    ("dead_leaves", column): Entry({seed: {"value": value} for seed, value in enumerate(seeds)})
    for column, seeds in values.items()
  }
  found["gaussian", "P=1"] = Entry({0: {"value": 0.1}})
  results = {tables[0].title: found, tables[1].title: {}}
  pictures = noise_distill.draw(site_of(folder / "drawn"), folder / "drawn" / "figures", tables, results)
  assert sorted(path.name for path in (folder / "drawn" / "figures").iterdir()) == ["curve-share.png", "table-0.png"]
  assert any(title.startswith("Top-1 by share P") for title in pictures)
  points = noise_distill._points(tables[0], found, "dead_leaves")
  np.testing.assert_allclose(points, [(0, 85, 7.0711), (0.25, 50, 0), (1, 15, 7.0711)], rtol=1e-4)
  del found["dead_leaves", "P=0"]
  assert not any("share P" in t and "Top-1 by" in t for t in noise_distill.draw(
    site_of(folder / "fewer"), folder / "fewer" / "figures", tables, results
  ))  # fmt: skip


def test_settings_tell_pools_apart(folder: pathlib.Path) -> None:
  plain = recipe(folder, "gaussian", "P=0")
  assert set(plain.settings) == {"teacher", "student", "noise", "running_fraction", "distillation", "evaluation"}
  assert plain.settings["noise"] == ["gaussian", 32, ""]
  changes: list[dict[str, Any]] = [
    {"gaussian_space": "pixel"},
    {"fresh": True},
    {"evaluation": "current"},
    {"schedule": "constant"},
    {"optimizer": "sgd"},
    {"temperature": 4.0},
  ]
  found = [recipe(folder, "gaussian", "P=0", **change).settings for change in changes]
  assert all(one != other for i, one in enumerate([plain.settings, *found]) for other in found[i:])
  leaves = recipe(folder, "dead_leaves", "P=0")
  assert leaves.settings == recipe(folder, "dead_leaves", "P=0", gaussian_space="pixel").settings


def test_spaces_and_sources_of_the_noise(folder: pathlib.Path) -> None:
  workspace, network = site_of(folder / "spaces"), tiny_network()
  normalized = recipe(folder, "gaussian", "P=0")._pool(workspace, 256, 0)
  x = (normalized - np.float32(network.input_mean)) / np.float32(network.input_std)
  np.testing.assert_allclose((x.mean(), x.std()), (0.0, 1.0), atol=0.01)
  pixel = recipe(folder, "gaussian", "P=0", gaussian_space="pixel")._pool(workspace, 256, 0)
  assert (pixel.min(), pixel.max()) == (0.0, 1.0)
  np.testing.assert_allclose(pixel.mean(), 0.5, atol=0.005)
  fresh = recipe(folder, "gaussian", "P=0", fresh=True)._fresh(network)
  assert fresh == FreshNoise.gaussian(network.image_shape, network.input_mean, network.input_std)
  fresh = recipe(folder, "dead_leaves", "P=0", fresh=True, shapes="circle")._fresh(network)
  assert fresh == FreshNoise.dead_leaves(network.image_shape, shapes="circle")


@pytest.mark.parametrize("batch", [4, 10])
def test_current_statistics_are_those_of_training_mode(folder: pathlib.Path, batch: int) -> None:
  network, data = tiny_network(), load_data(f"{folder / 'data.npz'}:test", image_shape=(8, 8, 3), num_classes=5)
  assert data.labels is not None
  x = (data.read(np.arange(10)) - np.float32(network.input_mean)) / np.float32(network.input_std)
  answers = [
    np.argmax(
      jax.jit(lambda x: network.module.apply(network.variables, x, train=True, mutable=["batch_stats"])[0])(p), 1
    )
    for p in ([x[:3], x[3:6], x[6:]] if batch == 4 else [x])
  ]
  expected = np.mean(np.concatenate(answers) == data.labels)
  assert current_top1(site_of(folder / f"current{batch}"), network, data, batch) == expected


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--running-fractions", "1.5"], "--running-fractions takes shares in [0, 1], found (1.5,)"),
    (["--pool", "0"], "--pool must be at least 1, found 0"),
    (["--pool", "5", "--fresh"], "--fresh draws the noise of every step anew: leave --pool out"),
    (["--student", "resnet9"], "resnet9"),
    (["--temperature", "0"], "temperature must be positive, found 0.0"),
    (["--plateau-steps", "0"], "plateau_steps must be at least 1, found 0"),
    (["--columns", "B=16"], "--columns has no 'B=16'; known: P=1, P=0, B=32, B=64, B=128, B=256, B=512"),
  ],
)
def test_bad_options_are_one_sentence(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
  assert noise_distill.main(arguments(folder, *options)) == 2
  errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
  assert len(errors) == 1
  assert message in errors[0]


def test_an_unknown_shape_of_leaves_is_named(folder: pathlib.Path) -> None:
  with pytest.raises(KwjaxError, match="unknown shape of leaves 'star'"):
    recipe(folder, "dead_leaves", "P=0", fresh=True, shapes="star")._fresh(tiny_network())
