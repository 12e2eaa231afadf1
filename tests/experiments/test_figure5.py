"""Figure 5 at the smallest size: which images stand in which column, and what is written below them."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from experiments.knowledge_within import figure5_images as figure5
from experiments.knowledge_within.figure5_images import Labelled, chosen_images, rows_of, shared_classes
from kwjax.analysis import panel_figures
from kwjax.synthesis import SynthesisConfig
from tests.networks import tiny_network


@pytest.mark.slow
def test_panels_and_cells_are_filled(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  monkeypatch.setenv("KWJAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr("experiments._harness.study.get_network", lambda *named, default: tiny_network())
  drawn = []
  draw = panel_figures.image_panels
  monkeypatch.setattr(
    panel_figures, "image_panels", lambda panels, *a, **k: (drawn.append((panels, k)), draw(panels, *a, **k))[1]
  )
  rng = np.random.default_rng(0)
  np.savez(tmp_path / "real.npz", images=rng.integers(0, 256, (20, 8, 8, 3), np.uint8), labels=np.arange(20) % 5)
  arguments = ["--network", "tiny", "--preset", "smoke", "--devices", "1", "--workdir", str(tmp_path / "run")]
  assert figure5.main([*arguments, "--rows", "real"]) == 2
  assert "the real images need --real-data" in capsys.readouterr().err

  arguments += ["--real-data", str(tmp_path / "real.npz")]
  assert figure5.main([*arguments, "--rows", "real", "inception", "gaussian", "--images", "10", "--shown", "2"]) == 0
  cells = json.loads((tmp_path / "run" / "report.json").read_text())["tables"][0]["cells"]
  assert all(cells[row]["J_KL"]["mean"] > 0 for row in ("real", "inception", "gaussian"))
  assert 0 <= cells["inception"]["on-target"]["mean"] <= 100
  assert cells["gaussian"]["on-target"]["mean"] is None
  assert cells["bns"]["J_KL"]["mean"] is None
  ((panels, options),) = drawn
  assert [panel.title for panel in panels] == ["Real images", "I: inception loss", "G: Gaussian noise"]
  assert [list(panel.names) for panel in panels] == [[f"class {c}" for c in range(5)]] * 2 + [[]]
  assert options["images_a_row"] == 5
  assert {len(panel.images) for panel in panels} == {10}
  assert panels[2].caption == f"10 images, J_KL {cells['gaussian']['J_KL']['mean']:.4g} nats"
  assert panels[1].caption.endswith("% on target")
  # Real images stand in the column of their label.
  with np.load(tmp_path / "real.npz") as real:
    for place, image in enumerate(panels[0].images):
      (index,) = np.flatnonzero((np.abs(real["images"] / 255 - image).max(axis=(1, 2, 3))) < 1e-6)
      assert real["labels"][index] == place % 5
  assert (tmp_path / "run" / "figures" / "images.png").exists()


def test_columns_are_classes_that_every_set_has() -> None:
  labels = [np.array([7, 1, 3, 9, 5, 1]), np.array([9, 3, 1, 7, 2])]
  assert shared_classes(labels, 10).tolist() == [1, 3, 7, 9]
  assert shared_classes(labels, 2).tolist() == [1, 9]
  assert shared_classes([np.array([1]), np.array([2])], 10).tolist() == []
  assert shared_classes([], 10).tolist() == []
  images = np.zeros((6, 1, 1, 1))
  # Three rows are asked for, class 9 has one image.
  found = [Labelled(images, labels[0]), Labelled(images, None), Labelled(images, np.array([1, 9, 9, 1, 1, 9]))]
  assert [rows_of(found[first:], np.array([1, 9]), 3) for first in range(3)] == [1, 3, 3]
  assert rows_of(found, np.zeros(0, int), 2) == 2
  assert chosen_images(found[0], np.array([1, 9]), 1, 10).tolist() == [1, 3]
  assert chosen_images(Labelled(images, np.array([1, 9, 9, 1, 1, 9])), np.array([1, 9]), 2, 10).tolist() == [0, 1, 3, 2]
  assert chosen_images(Labelled(images, None), np.array([1, 9]), 2, 10).tolist() == [0, 1, 2, 3]
  assert chosen_images(Labelled(images, None), np.zeros(0, int), 1, 4).tolist() == [0, 1, 2, 3]


def test_schemes_with_targets() -> None:
  has = {
    name: figure5.has_targets(SynthesisConfig.preset(name))
    for name in ("bns", "inception", "bns+inception", "gaussian")
  }
  assert has == {"bns": False, "inception": True, "bns+inception": True, "gaussian": False}
