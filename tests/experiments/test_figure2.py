"""Figure 2 at the smallest size: what is watched is not optimized, and the claims are judged by the curves."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest

from experiments._harness.study import StudyOptions, choose
from experiments._harness.study_setup import load
from experiments.knowledge_within import figure2_monitor
from experiments.knowledge_within.figure2_monitor import facts, falls, falls_then_diverges
from kwjax.analysis.curves import CurvePanel, curve_panels
from kwjax.cli.options import sizes
from kwjax.errors import KwjaxError
from kwjax.runtime.devices.parallel import device_group
from tests.experiments.tiny_study import command, tiny_network_loaded
from tests.networks import tiny_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
  """A tiny network as the one that is loaded."""
  folder = tmp_path_factory.mktemp("figure2")
  with tiny_network_loaded():
    yield folder


@pytest.mark.parametrize(
  ("curve", "diverges", "sinks"),
  [
    ([3.0, 1.0, 2.0, 4.0], True, False),
    ([3.0, 1.0, 2.0, 2.9], False, True),  # rises, but not beyond its start
    ([1.0, 2.0, 3.0], False, False),  # never fell
    ([3.0, 2.0, 1.0], False, True),  # never rose
    ([3.0, 1.0, 3.0], False, False),
  ],
)
def test_claims_are_judged_by_the_curve(curve: list[float], diverges: bool, sinks: bool) -> None:
  assert falls_then_diverges(np.asarray(curve)) is diverges
  assert falls(np.asarray(curve)) is sinks


def test_facts_of_a_curve() -> None:
  assert facts(np.asarray([3.0, 1.0, 2.0, 4.0])) == {"start": 3.0, "lowest": 1.0, "lowest at step": 1.0, "last": 4.0}


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_settings_are_published_and_watch_what_they_do_not_optimize(preset: str) -> None:
  options, network = StudyOptions(preset=preset), tiny_network()
  study = figure2_monitor.build(load(options, network, device_group(1), sizes(options.main_job(), network)))
  cells, _ = choose(study, options)
  settings = {cell.row: cell.plan.settings["source"] for cell in cells}
  for scheme, monitored in (("inception", "bns"), ("bns", "smoothness")):
    config = settings[scheme]["config"]
    assert config["objective"][monitored] == 0.0
    assert config["objective"]["monitor"] in ([monitored], (monitored,))
    assert config["init"] == "randn"
    expected = {"cpu": (128, 128, 2, 200, (160,)), "paper": (800, 800, 4, 1000, (800,))}[preset]
    assert (settings[scheme]["count"], config["batch_size"], config["duplicates"]) == expected[:3]
    assert (config["steps"], tuple(config["drops"])) == expected[3:]
  objective = settings["bns"]["config"]["objective"]
  assert (objective["smoothness_size"], objective["smoothness_sigma"]) == (3, 1.0)
  assert settings["inception"]["config"]["objective"]["inception"] == 1e-3


@pytest.mark.slow
def test_report_states_both_claims_with_their_numbers(folder: pathlib.Path) -> None:
  given = command(folder)
  assert figure2_monitor.main([*given, "--steps", "6"]) == 0
  report = json.loads((folder / "run" / "report.json").read_text())
  assert len(report["claims"]) == len(report["notes"]) == 2
  terms = {"inception": "jkl", "bns": "smoothness"}
  for table, claim, note in zip(report["tables"], report["claims"], report["notes"], strict=True):
    (scheme,) = table["rows"]
    curve = report["curves"][f"{scheme}, seed 0"][terms[scheme]]
    cells = {name: cell["mean"] for name, cell in table["cells"][scheme].items()}
    assert len(curve) == 6
    assert cells == {name: pytest.approx(value) for name, value in facts(np.asarray(curve)).items()}
    assert {name: claim[name] for name in cells} == {name: pytest.approx(value) for name, value in cells.items()}
    assert ("does not hold" in note) is not claim["holds"]
    assert (folder / "run" / "figures" / f"{scheme}.png").exists()
  assert report["claims"][1]["holds"] is (report["claims"][1]["last"] < report["claims"][1]["start"])
  # Made once, for all columns, the report and the figure.
  assert len(list((folder / "run" / "synthesis").glob("*/images/manifest.json"))) == 2


def test_panels_refuse_what_they_cannot_draw(tmp_path: pathlib.Path) -> None:
  good = CurvePanel("x", "y", {"a": ([0, 1, 2], [1.0, np.nan, 2.0])}, log="y", points={"a": ["p", "q", "r"]})
  assert curve_panels([good, good], tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
  with pytest.raises(KwjaxError, match="curve 'a' of y has 2 x and 1 y"):
    curve_panels([CurvePanel("x", "y", {"a": ([0, 1], [1.0])})], tmp_path / "b.png")
  with pytest.raises(KwjaxError, match="nothing to draw of y"):
    curve_panels([CurvePanel("x", "y", {"a": ([0, 1], [-1.0, 0.0])}, log="y")], tmp_path / "b.png")
  with pytest.raises(KwjaxError, match="no panels"):
    curve_panels([], tmp_path / "b.png")
