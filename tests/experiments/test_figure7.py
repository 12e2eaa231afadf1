"""Figure 7 at the smallest size: predictions of growing parts of a set, and chance against its closed form."""

from __future__ import annotations

import itertools
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from experiments.knowledge_within import figure7_bias as figure7
from kwjax.analysis.bias import tail_share
from tests.networks import tiny_network


@pytest.mark.slow
def test_cells_are_filled(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("KWJAX_CACHE", str(tmp_path / "cache"))
  network = tiny_network()
  monkeypatch.setattr("experiments._harness.study.get_network", lambda *named, default: network)
  rng = np.random.default_rng(0)
  np.savez(tmp_path / "real.npz", images=rng.integers(0, 256, (6, 8, 8, 3), np.uint8))
  arguments = ["--network", "tiny", "--preset", "smoke", "--devices", "1", "--workdir", str(tmp_path / "run")]
  arguments += ["--real-data", str(tmp_path / "real.npz"), "--rows", "real", "gaussian", "chance"]
  assert figure7.main(arguments) == 0
  report = json.loads((tmp_path / "run" / "report.json").read_text())
  tables = dict(zip(itertools.product(("evenness", "tail"), ("soft", "hard")), report["tables"], strict=True))
  assert tables["evenness", "soft"]["columns"] == ["1", "2", "4", "8"]
  # All six real images were drawn for four and fewer; eight are more than there are.
  cells = tables["tail", "hard"]["cells"]
  assert [cells["real"][column]["mean"] is None for column in ("1", "2", "4", "8")] == [False] * 3 + [True]
  # One image takes one class: entropy zero, and no tail.
  assert tables["evenness", "hard"]["cells"]["gaussian"]["1"]["mean"] == 0
  assert cells["chance"]["1"]["mean"] == 0
  assert "chance" not in tables["evenness", "soft"]["cells"]
  record = tables["tail", "soft"]["cells"]["gaussian"]["8"]
  masses = np.asarray(record["records"]["0"]["mass"])
  assert masses.sum() == pytest.approx(1)
  assert record["mean"] == pytest.approx(100 * tail_share(masses))
  (stored,) = (tmp_path / "run" / "synthesis").glob("gaussian*/images/*.safetensors")
  logits = jax.jit(network.apply)(safetensors.numpy.load_file(stored)["images"])
  hard = np.bincount(np.asarray(logits).argmax(axis=1), minlength=5) / 8
  np.testing.assert_allclose(cells["gaussian"]["8"]["records"]["0"]["mass"], hard)
  assert {path.name for path in (tmp_path / "run" / "figures").iterdir()} >= {"classes.png", "counts.png"}


def test_parts_of_a_set() -> None:
  assert figure7.counts_up_to(384) == (48, 96, 192, 384)
  assert figure7.counts_up_to(3) == (1, 3)


def test_chance_is_the_expectation_of_even_draws() -> None:
  # Of two classes the rarer one of two labels is drawn once with probability 1/2: its mass is 1/2 then, else 0.
  assert figure7._chance("tail", 2, 2).compute(None, 0)["value"] == pytest.approx(0.5, abs=0.1)
  # Entropy log 2 with probability 1/2, else 0.
  assert figure7._chance("evenness", 2, 2).compute(None, 0)["value"] == pytest.approx(0.5, abs=0.1)
  assert figure7._chance("evenness", 10, 100_000).compute(None, 0)["value"] == pytest.approx(1, abs=1e-3)
