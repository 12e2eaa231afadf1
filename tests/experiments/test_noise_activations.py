"""Activations on noise at the smallest size: cells against the library, claims in words, refusals."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest

from experiments.noise import activations as noise_activations
from experiments.noise.activations import CURRENT, RUNNING, claims
from kwjax.analysis.activations import observe_activations
from kwjax.analysis.bias import class_mass, evenness
from kwjax.errors import KwjaxError
from kwjax.runtime.files import read_sealed_json
from kwjax.synthesis import dead_leaves
from tests.experiments.tiny_study import command, tiny_network_loaded
from tests.networks import tiny_network


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A tiny network as the one that is loaded."""
  with tiny_network_loaded():
    yield tmp_path


@pytest.mark.slow
def test_cells_are_what_the_library_measures(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  drawn = dead_leaves(noise_key(0), 8, (8, 8, 3))
  rng = np.random.default_rng(0)
  np.savez(folder / "real.npz", images=rng.integers(0, 256, (8, 8, 8, 3), np.uint8))
  assert noise_activations.main(command(folder, "--real-data", str(folder / "real.npz"))) == 0
  report = json.loads((folder / "run" / "report.json").read_text())
  (table,) = report["tables"]
  assert all(cell["mean"] is not None for row in table["cells"].values() for cell in row.values())
  for statistics, current in ((RUNNING, ()), (CURRENT, (".*",))):
    cells = table["cells"][f"dead_leaves-{statistics}"]
    found = observe_activations(tiny_network(), drawn, current=current, batch_size=10)
    assert cells["J_KL"]["mean"] == pytest.approx(np.mean(list(found.divergence().values())), rel=1e-4)
    assert cells["deep spread"]["mean"] == pytest.approx(found.spread()["bn1"], rel=1e-4)
    mass = class_mass(found.logits)
    assert cells["evenness"]["mean"] == pytest.approx(100 * evenness(mass.soft), rel=1e-4)
    assert cells["top class"]["mean"] == pytest.approx(100 * mass.hard.max())
    assert cells["dead"]["mean"] == pytest.approx(100 * found.dead_share())
  assert table["cells"]["gaussian-running"]["J_KL"]["mean"] != table["cells"]["gaussian-current"]["J_KL"]["mean"]
  assert len(report["notes"]) == 2
  assert list(report["by_layer"]["real-running"]["divergence"]) == ["bn0", "bn1"]
  drawings = {path.name for path in (folder / "run" / "figures").iterdir()}
  assert drawings == {"running.png", "current.png", "depth.png"}
  stored = [read_sealed_json(path) for path in (folder / "run" / "stages" / "activations").iterdir()]
  assert len(stored) == 6
  # The same command measures nothing again.
  monkeypatch.setattr(noise_activations, "observe_activations", None)
  assert noise_activations.main(command(folder, "--real-data", str(folder / "real.npz"))) == 0


def noise_key(seed: int) -> object:
  from kwjax.compression.workspace import GAUSSIAN_KEY, stream_key

  return stream_key(seed, GAUSSIAN_KEY)


def facts(jkl: float, spread: float, evenness: float) -> dict[str, float]:
  return {"J_KL": jkl, "deep spread": spread, "dead": 0.0, "evenness": evenness, "top class": 0.5}


def test_claims_are_judged_by_their_numbers() -> None:
  collapsed, alike = facts(0.5, 0.6, 0.2), facts(0.1, 1.2, 0.9)
  (sentence,) = claims({"gaussian-running": [collapsed], "gaussian-current": [alike, alike], "real-running": [alike]})
  assert "gaussian: " in sentence
  assert "even, holds: J_KL 0.5 running, 0.1 current" in sentence
  (sentence,) = claims({"dead_leaves-running": [alike], "dead_leaves-current": [collapsed]})
  assert "does not hold" in sentence
  assert claims({"gaussian-running": [collapsed]}) == []
  # Both must be nearer.
  (sentence,) = claims({"gaussian-running": [facts(0.5, 0.6, 0.9)], "gaussian-current": [facts(0.1, 1.0, 0.2)]})
  assert "does not hold" in sentence


def test_bad_options_are_one_sentence(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  assert noise_activations.main(command(folder, "--batch-size", "1")) == 2
  assert noise_activations.main(command(folder, "--rows", "real-running")) == 2
  errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
  assert "--batch-size must be at least 2, two images a device, found 1" in errors[0]
  assert "--real-data" in errors[1]
  with pytest.raises(KwjaxError, match="no BatchNorm"):
    noise_activations.build(setup_without_batch_norm())


def setup_without_batch_norm() -> noise_activations.Setup:
  return noise_activations.Setup(None, tiny_network(batch_norm=False), None, None, None, None)  # type: ignore[arg-type]
