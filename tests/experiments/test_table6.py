"""Table 6 at the smallest size: the CE loss is what it says, and cells are filled."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.knowledge_within import table6_objectives
from experiments.knowledge_within.table6_objectives import DecidedTeacher
from kwjax.distillation.losses import kl_divergence
from tests.experiments.tiny_study import command, tiny_network_loaded, write_noise
from tests.networks import tiny_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
  """A tiny network as the one that is loaded, and labelled images."""
  folder = tmp_path_factory.mktemp("table6")
  write_noise(folder / "data.npz", "test")
  with tiny_network_loaded():
    yield folder


def test_kl_to_a_decided_teacher_is_the_cross_entropy_to_its_choice() -> None:
  network = tiny_network()
  images = jax.random.uniform(jax.random.key(0), (6, 8, 8, 3))
  student = jax.random.normal(jax.random.key(1), (6, 5))
  chosen = jnp.argmax(network.apply(images), -1)
  teacher = DecidedTeacher(network).apply(images)

  def loss(logits: jax.Array) -> jax.Array:
    return kl_divergence(logits, teacher)

  def expected(logits: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, chosen))

  np.testing.assert_allclose(loss(student), expected(student), rtol=1e-6)
  np.testing.assert_allclose(jax.grad(loss)(student), jax.grad(expected)(student), atol=1e-7)


@pytest.mark.slow
def test_cells_are_filled(folder: pathlib.Path) -> None:
  given = command(folder)
  data = ["--eval-data", f"{folder / 'data.npz'}:test", "--sizes", "8", "4"]
  assert (
    table6_objectives.main([*given, *data, "--distill-learning-rate", "0.5", "--rows", "4", "--columns", "bns-CE"]) == 0
  )
  report = json.loads((folder / "run" / "report.json").read_text())
  (table,) = report["tables"]
  assert report["float"]["count"] == 10
  assert table["rows"] == ["4", "8"]
  cells = table["cells"]["4"]
  assert [column for column in cells if cells[column]["seeds"]] == ["bns-CE"]
  assert cells["bns-CE"]["records"]["0"]["images"] == 4
  assert "the first 4 of 8 bns images" in cells["bns-CE"]["protocol"]
  assert all(cell["mean"] is None for cell in table["cells"]["8"].values())


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (["--sizes", "0"], "--sizes must be at least 1, found 0"),
    (["--bits", "4w"], "cannot read bits '4w'"),
    (["--columns", "real-KL"], "--real-data FILE.npz:train"),
  ],
)
def test_mistakes_are_one_sentence_and_status_2(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
  given = ["--network", "tiny", "--preset", "smoke", "--workdir", str(folder / "bad")]
  assert table6_objectives.main([*given, "--eval-data", f"{folder / 'data.npz'}:test", *more]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ")
  assert message in line
  assert not (folder / "bad").exists()
