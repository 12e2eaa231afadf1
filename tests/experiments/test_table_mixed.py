"""Bits by layer at the smallest size: cells within the budget, resumed, pictures, refusals."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.calibration import table_mixed
from kwjax.intercept import matmul_layers
from tests.networks import tiny_network


@pytest.fixture
def arguments(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
  """A command line on the tiny network and images that it labelled itself."""
  images = np.asarray(jax.random.uniform(jax.random.key(0), (8, 8, 8, 3)))
  labels = np.asarray(jnp.argmax(tiny_network().apply(images), -1))
  np.savez(tmp_path / "data.npz", test_images=(images * 255).astype(np.uint8), test_labels=labels)
  monkeypatch.setattr("experiments._harness.study.get_network", lambda *named, default: tiny_network())
  monkeypatch.setenv("KWJAX_CACHE", str(tmp_path / "cache"))
  given = ["--eval-data", f"{tmp_path / 'data.npz'}:test", "--preset", "smoke", "--devices", "1"]
  return [*given, "--workdir", str(tmp_path / "run"), "--sensitivity-images", "2"]


@pytest.mark.slow
def test_a_copy_by_layer_is_as_large_as_one_of_equal_bits(arguments: list[str], tmp_path: pathlib.Path) -> None:
  columns = ["--columns", "equal", "by layer"]
  assert table_mixed.main([*arguments, "--budgets", "4w4a", "3.5w4a", *columns]) == 0
  report = json.loads((tmp_path / "run" / "report.json").read_text())
  kl = report["tables"][1]["cells"]
  assert kl["3.5w4a"]["equal"]["mean"] is None  # no layer has half a bit
  assert kl["4w4a"]["equal"]["mean"] > 0 and kl["4w4a"]["by layer"]["mean"] > 0
  records = [json.loads(path.read_text())["result"] for path in (tmp_path / "run" / "stages" / "copies").iterdir()]
  layers = {layer.name: layer for layer in matmul_layers(tiny_network())}
  sizes = {name: np.prod(layer.kernel_shape) for name, layer in layers.items()}
  means = sorted(
    sum(ends[0] * sizes[name] for name, ends in record["bits"].items()) / sum(sizes.values()) for record in records
  )
  assert all(set(record["bits"]) == set(layers) for record in records)
  assert means[0] <= 3.5 and means[1] <= 4.0 and means[-1] == 4.0
  assert {path.name for path in (tmp_path / "run" / "figures").iterdir()} >= {"size.png", "bits-4w4a.png"}
  stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "stages").rglob("*.json")}
  assert table_mixed.main([*arguments, "--budgets", "4w4a", "3.5w4a", *columns]) == 0
  assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--budgets", "4w32a"], "--budgets takes mean bits of both sides from 2 to 8"),
    (["--budgets", "1w4a"], "a budget is mean bits from 2 to 8"),
    (["--sensitivity-images", "0"], "--sensitivity-images must be at least 1, found 0"),
  ],
)
def test_bad_options_are_one_sentence(
  arguments: list[str], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
  assert table_mixed.main([*arguments, *options]) == 2
  errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
  assert len(errors) == 1
  assert message in errors[0]
