"""Table 4 at the smallest size: which network sees which set, what is divided by what, and the areas of known scores."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from experiments._harness.study import choose
from experiments._harness.study_options import Missing
from experiments._harness.study_setup import load
from experiments.knowledge_within import table4_similarity as table4
from experiments.knowledge_within.similarity_options import Options, subjects
from experiments.knowledge_within.similarity_sets import GROUP, Subject, group_jkl
from kwjax.analysis.similarity import measure
from kwjax.cli.options import sizes
from kwjax.network import Network
from kwjax.runtime.devices.parallel import device_group
from tests.networks import TinyNet, random_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
  """Two tiny networks in the place of those that folders hold, and three sets: bright, dark, and grey ones of another size."""
  folder = tmp_path_factory.mktemp("table4")
  rng = np.random.default_rng(0)
  for name, low, high in (("bright", 128, 256), ("dark", 0, 64)):
    arrays = {}
    for split, count in (("train", 40), ("test", 36)):
      arrays[f"{split}_images"] = rng.integers(low, high, (count, 8, 8, 3), np.uint8)
      arrays[f"{split}_labels"] = np.arange(count) % 5
    np.savez(folder / f"{name}.npz", **arrays)
  np.savez(folder / "small.npz", images=rng.integers(0, 256, (20, 4, 4, 3), np.uint8))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("KWJAX_CACHE", str(folder / "cache"))
    patch.setattr("experiments.knowledge_within.similarity_options.load_network", lambda path: network(path.name))
    patch.setattr("experiments._harness.study.get_network", lambda folder, *named, default: network(folder.name))
    yield folder


def network(name: str) -> Network:
  return random_network(TinyNet(), seed=len(name)).replace(name=name)


def arguments(folder: pathlib.Path, *more: str) -> list[str]:
  data = [f"bright={folder}/bright.npz:test", f"dark={folder}/dark.npz:test", f"small={folder}/small.npz"]
  shown = ["--networks", "bright=one", "--data", *data]
  return [*shown, "--preset", "smoke", "--devices", "1", "--workdir", str(folder / "run"), *more]


@pytest.mark.slow
def test_cells_are_filled(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  trained, scores = ["--train-data", f"bright={folder}/bright.npz:train"], ["fitted", "max-softmax", f"J_KL-{GROUP}"]
  assert table4.main(arguments(folder, *trained, "--rows", "train", "dark", "--columns", "one@bright", *scores)) == 0
  tables = json.loads((folder / "run" / "report.json").read_text())["tables"]
  raw, ratio, found = (table["cells"] for table in tables)
  for row in ("train", "dark"):
    expected = raw[row]["one@bright"]["mean"] / raw["train"]["one@bright"]["mean"]
    assert ratio[row]["one@bright"]["mean"] == pytest.approx(expected)
  record = raw["dark"]["one@bright"]["records"]["0"]
  layers = record["per_layer"]
  assert list(layers) == ["input", "bn0", "bn1"]
  assert record["value"] == pytest.approx((layers["bn0"] + layers["bn1"]) / 2)
  assert record["with_input"] == pytest.approx(np.mean(list(layers.values())))
  assert found["dark"]["max-softmax"]["records"]["0"]["counts"] == [32, 32]
  assert found["dark"][f"J_KL-{GROUP}"]["records"]["0"]["counts"] == [2, 2]
  assert found["train"]["max-softmax"]["mean"] is not None
  figures = {path.name for path in (folder / "run" / "figures").iterdir()}
  assert figures >= {"jkl.png", "ratio.png", "roc-0.png"}
  assert found["dark"]["fitted"]["mean"] is not None
  assert table4.main(arguments(folder, *trained, "--rows", "small", "--columns", "fitted")) == 2
  assert "the bright network cannot be shown small" in capsys.readouterr().err


def test_each_network_is_judged_on_its_own_images(folder: pathlib.Path) -> None:
  files = {name: f"{name}={folder}/{name}.npz" for name in ("bright", "dark")}
  options = Options(
    networks=("bright=one", "dark=other"),
    data=tuple(f"{file}:test" for file in files.values()),
    train_data=(f"{files['bright']}:train",),
    preset="smoke",
  )
  one = network("one")
  study = table4.build(load(options, one, device_group(1), sizes(options.main_job(), one)))
  cells, left_out = choose(study, options)
  assert left_out == ["left out: the training data of the dark network need --train-data dark=FILE.npz:train"]
  raw, ratio, *detection = study.tables
  by_table = {table.title: {(c.row, c.column) for c in cells if c.table is table} for table in study.tables}
  rows = {"bright", "dark", "random", "gaussian", "fgsm"}
  assert by_table[raw.title] == {(row, name) for row in rows for name in ("one@bright", "other@dark")} | {
    ("train", "one@bright")
  }
  assert by_table[ratio.title] == {(row, "one@bright") for row in (*rows, "train")}
  without = {"divergence", "max-softmax", f"J_KL-{GROUP}"}
  # A reference is not judged on what it was fitted on; without training images there is none.
  assert by_table[detection[0].title] == {
    (row, score) for row in (*rows - {"bright"}, "train") for score in (*without, "fitted")
  } - {("train", "fitted")}
  assert by_table[detection[1].title] == {(row, score) for row in rows - {"dark"} for score in without}
  settings = {(c.table.title, c.row, c.column): c.plan.settings for c in cells}
  assert settings[raw.title, "dark", "one@bright"] != settings[raw.title, "dark", "other@dark"]
  # Groups and noise are drawn by seed; sets are too where only a part of them is shown.
  assert all(cell.plan.seeded for cell in cells)


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (["--networks", "grey=one"], "--networks grey=one: there is no 'grey' in --data, found bright, dark, small"),
    (["--networks", "one"], "--networks takes NAME=VALUE, found 'one'"),
    (["--data", "fgsm=x.npz"], "--data needs different names other than train, random, gaussian, fgsm"),
    (["--data", "dark=nowhere.npz"], "nowhere.npz"),
    (["--networks", "dark=one", "dark=one"], "two networks that are called one@dark"),
    (["--train-data", "dark=x.npz"], "--train-data dark: no network of --networks is called that, found bright"),
    (["--networks", "small=one"], "smaller than the wanted 8x8"),
    (["--eval-data", "dark.npz"], "--data NAME=SPEC"),
  ],
)
def test_what_cannot_be_measured_is_refused(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
  assert table4.main(arguments(folder, *more)) == 2
  assert message in capsys.readouterr().err


def test_training_images_are_not_the_own_ones(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  assert table4.main(arguments(folder, "--train-data", f"bright={folder}/bright.npz:test")) == 2
  assert "holds the images of --data bright" in capsys.readouterr().err


def test_attacked_images_lower_the_own_label(folder: pathlib.Path) -> None:
  options = Options(
    networks=("dark=other",), data=(f"dark={folder}/dark.npz:test", f"small={folder}/small.npz"), preset="smoke"
  )
  (subject,) = subjects(options)
  with pytest.raises(Missing, match="cannot be shown small"):
    subject.images("small")
  plain, labels = subject.images("dark").read(0)
  site = type("Site", (), {"group": None})
  attacked = subject.pixels(site, "fgsm", 0)
  assert labels is not None
  # 0.1 in normalized space, of a network with a standard deviation of 0.25.
  np.testing.assert_allclose(np.abs(attacked - plain).max(), 0.025, atol=1e-6)

  def own_label(images: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(jax.jit(subject.network.apply)(images)))[np.arange(len(labels)), labels]

  assert (own_label(attacked) < own_label(plain)).all()


def test_j_kl_of_a_group_is_that_of_a_set() -> None:
  images = np.random.default_rng(0).uniform(size=(GROUP, 8, 8, 3)).astype(np.float32)
  assert float(group_jkl(network("one"), images)) == pytest.approx(float(measure(network("one"), images).jkl), rel=1e-4)


def test_published_numbers_stand_beside_a_resnet44_alone() -> None:
  subject = Subject("a", network("one").replace(arch="resnet44"), "CIFAR-10", {}, {}, None)
  rows = ("train", "CIFAR-10", "mnist", "STL-10", "random", "gaussian")
  assert table4._published({"a": subject}, rows) == {
    ("train", "a"): 0.023,
    ("mnist", "a"): 0.151,
    ("STL-10", "a"): 0.031,
    ("random", "a"): 0.498,
  }
  assert table4._published({"a": Subject("a", network("one"), "CIFAR-10", {}, {}, None)}, rows) == {}
