"""docs/results.md is what the kept reports say, and nothing in it or in them depends on the machine."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import pytest

from experiments import results_page
from experiments._harness import published, results_merge, results_store
from experiments._harness.results_store import SECTIONS, Stored
from experiments._harness.tables import Entry, Table, as_json
from experiments.results_page import render
from kwjax.errors import KwjaxError

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def finished_run(folder: pathlib.Path, study: str = "table2_cifar") -> pathlib.Path:
  """The folder of a study with two seeds of one cell, one without randomness, one not finite and one not measured."""
  table = Table(
    "Table 2: tiny",
    rows=("real", "bns"),
    columns=("4w4a*", "J_KL"),
    paper={("real", "4w4a*"): 89.19, ("bns", "4w4a*"): 88.5},
    unit={"4w4a*": "%", "J_KL": "nats"},
    note="* first and last layer 8 bit.",
  )
  results = {
    ("real", "4w4a*"): Entry(
      {0: {"value": 0.90, "seconds": 30.0}, 2: {"value": 0.92, "seconds": 90.0}}, "4w4a on /data/x/images.npz:test"
    ),
    ("bns", "4w4a*"): Entry({}, "never done"),
    ("real", "J_KL"): Entry({0: {"value": 0.0419, "seconds": 12.0, "per_layer": {"bn1": 1.0}}}, "clean", seeded=False),
    ("bns", "J_KL"): Entry({0: {"value": None, "seconds": 0.0}}, "clean"),
  }
  report = {
    "network": "tiny_net",
    "protocol": {"teacher": "tiny_net, from ../weights/tiny.th", "nothing": None},
    "float": {"top1": 0.9341, "count": 1017},
    "versions": {"jax": "0.10.2", "backend": "cpu", "cpu_count": 2, "device": "cpu", "devices": 2},
    "command": "python -m experiments.knowledge_within.table2_cifar --network /home/me/net --workdir '/tmp/a b' --columns '4w4a*'",  # noqa: E501
    "tables": [as_json(table, results)],
    "notes": ["the ordering KD < KD+IQ shows"],
  }
  (folder / "figures").mkdir(parents=True)
  (folder / "figures" / "table-0.png").write_bytes(b"\x89PNG")
  (folder / "report.json").write_text(json.dumps(report))
  (folder / "settings.json").write_text(json.dumps({"study": study}))
  return folder


def test_the_page_is_what_the_kept_reports_say() -> None:
  """`python -m experiments.results_page` makes it anew; it is never edited."""
  page = render(results_store.read(DOCS / "results"), results_page.notes(DOCS / "results"))
  assert (DOCS / "results.md").read_text() == page


def test_figures_of_the_page_are_there_and_no_others() -> None:
  shown = {figure for report in results_store.read(DOCS / "results") for figure in report.content["figures"]}
  assert {path.name for path in (DOCS / "images" / "results").glob("*")} == shown


def test_kept_reports_name_no_place_on_a_machine() -> None:
  for path in (DOCS / "results").glob("*.json"):
    assert not re.search(r'["= ](/|\.\./|~/)\w', path.read_text()), path


def test_a_run_is_kept_and_shown(tmp_path: pathlib.Path) -> None:
  run, out = finished_run(tmp_path / "run"), tmp_path / "docs" / "results.md"
  arguments = ["--collect", str(run), "--figures", "table-0.png", "--out", str(out)]
  assert results_page.main(arguments) == 0
  page = out.read_text()
  assert "|  | 4w4a\\* (%) | J\\_KL (nats) |" in page
  # The sample standard deviation of 90 and 92 is the square root of 2.
  assert "| real | 91.00 ± 1.41 (2); paper 89.19 | 0.04190 |" in page
  assert "| bns | not measured; paper 88.5 | not finite (1) |" in page
  assert "Measured on 2 CPU cores until 20" in page
  assert "2.2 minutes of work" in page
  assert "float: top-1 93.41% of 1017 images" in page
  assert "`python -m experiments.knowledge_within.table2_cifar --network net --columns '4w4a*'`" in page
  assert "- real, 4w4a\\* (seed 0, 2): 4w4a on images.npz:test." in page
  assert "never done" not in page
  assert "- the ordering KD \\< KD+IQ shows\n" in page
  assert "from tiny.th" in page
  (figure,) = (tmp_path / "docs" / "images" / "results").iterdir()
  assert f"(images/results/{figure.name})" in page
  kept = json.loads((tmp_path / "docs" / "results" / "table2_cifar-tiny_net.json").read_text())
  assert kept["tables"][0]["cells"]["real"]["4w4a*"]["values"] == [90.0, 92.0]
  assert "per_layer" not in json.dumps(kept)

  assert results_page.main(["--out", str(out)]) == 0
  assert out.read_text() == page
  assert results_page.main(["--collect", str(run), "--out", str(out)]) == 0
  assert not list((tmp_path / "docs" / "images" / "results").iterdir())  # kept again without its figure


def kept_report(values: dict[tuple[str, str], dict[int, float]], *, protocol: str = "p") -> dict[str, Any]:
  """What is kept of a study whose cells have these values by seed, ten seconds each."""
  rows, columns = (list(dict.fromkeys(key[part] for key in values)) for part in (0, 1))
  cell = lambda seeds: {
    "values": list(seeds.values()),
    "seeds": list(seeds),
    "unit": "%",
    "paper": None,
    "protocol": protocol if seeds else None,
    "seconds": 10.0 * len(seeds),
  }
  cells = {row: {column: cell(values.get((row, column), {})) for column in columns} for row in rows}
  table = {"title": "t", "rows": rows, "columns": columns, "note": "", "cells": cells}
  return {"study": "table2_cifar", "network": "n", "notes": [protocol], "seconds": 0.0, "tables": [table]}


def test_a_run_joins_the_kept_report() -> None:
  kept = kept_report({("bns", "4w4a"): {0: 1.0, 1: 2.0}, ("old", "4w4a"): {0: 3.0}, ("bns", "J"): {0: 9.0}})
  run = kept_report({("real", "4w4a"): {0: 4.0}, ("bns", "4w4a"): {1: 5.0, 2: 6.0}})
  found = results_merge.merged(run, kept)
  (table,) = found["tables"]
  assert (table["rows"], table["columns"]) == (["real", "bns", "old"], ["4w4a", "J"])
  assert table["cells"]["bns"]["4w4a"]["seeds"] == [0, 1, 2]
  assert table["cells"]["bns"]["4w4a"]["values"] == [1.0, 5.0, 6.0]
  assert table["cells"]["old"]["4w4a"]["values"] == [3.0]
  assert table["cells"]["bns"]["J"]["values"] == [9.0]
  assert table["cells"]["real"]["J"]["values"] == []
  assert found["seconds"] == 70.0
  assert results_store.as_table(table)[0].rows == ("real", "bns", "old")


def test_cells_measured_in_another_way_do_not_mix() -> None:
  kept = kept_report({("bns", "4w4a"): {0: 1.0, 1: 2.0}}, protocol="100 steps")
  run = kept_report({("bns", "4w4a"): {1: 5.0}}, protocol="200 steps")
  (table,) = results_merge.merged(run, kept)["tables"]
  assert table["cells"]["bns"]["4w4a"]["values"] == [5.0]
  assert results_merge.merged(run, kept)["notes"] == ["200 steps"], "a sentence about a value that is gone"
  joined = results_merge.merged(kept_report({("real", "4w4a"): {0: 4.0}}), kept)
  assert joined["notes"] == ["100 steps", "p"]
  with pytest.raises(KwjaxError, match="cannot merge: the run's network is 'other'"):
    results_merge.merged({**run, "network": "other"}, kept)


def test_runs_are_shown_without_being_kept(tmp_path: pathlib.Path) -> None:
  run, out = finished_run(tmp_path / "run"), tmp_path / "look.md"
  assert results_page.main(["--runs", str(run), "--machine", "a big one", "--out", str(out)]) == 0
  assert "91.00 ± 1.41 (2)" in out.read_text()
  assert "Measured on a big one until" in out.read_text()
  assert not (tmp_path / "results").exists()


def stored(tmp_path: pathlib.Path, study: str, name: str) -> Stored:
  return Stored(name, results_store.reduced(finished_run(tmp_path / name, study)))


def test_sections_follow_the_paper_and_the_rest_says_not_measured(tmp_path: pathlib.Path) -> None:
  reports = [stored(tmp_path, "figure2_monitor", "b"), stored(tmp_path, "table1_ablation", "a")]
  page = render(reports, {})
  assert page == render(reports[::-1], {})
  headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
  assert [heading.replace("\\", "") for heading in headings] == list(SECTIONS.values())
  unmeasured = re.findall(r"Not measured yet: `python -m ([\w.]+) --help`", page)
  missing = [study for study in SECTIONS if study not in ("figure2_monitor", "table1_ablation")]
  assert unmeasured == list(map(results_store.module_of, missing))


def published_table(page: str, title: str) -> tuple[dict[str, list[str]], str]:
  """Rows of a table of the paper's numbers, its header under "", and the words below."""
  table, words = page.split(f"**The paper's {title}", 1)[1].split("\n\n")[1:3]
  lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
  return {line[0]: line[1:] for line in lines if line[0] != "---"}, words


def test_numbers_of_networks_without_a_report_are_shown_alone() -> None:
  """Haroush et al. (2020), tables 1 to 4 and 7, as far as they are known."""
  page = render([], {})
  rows, words = published_table(page, "Table 1: ResNet-44")
  assert rows[""] == ["KD", "KD+IQ+Mix"]
  assert rows["2000"] == ["85.41", "88.36"]
  assert list(rows)[1:] == ["1", "10", "100", "1000", "2000"]
  assert "not measured here: " in words
  assert "`python -m experiments.knowledge_within.table1_ablation --preset paper` measures them" in words
  rows, _ = published_table(page, "Table 2: ResNet-44")
  assert rows["bns"] == ["", "", "88.5", "", "88.52", "89.6"]
  rows, words = published_table(page, "Table 2: WRN-28-10")
  assert rows["gaussian"] == ["47.81", "64.8", "65.15"]
  assert "no public weights" in words
  for network, row in (
    ("ResNet-18", ["68.94", "53.02", "63.98", "63.58"]),
    ("MobileNetV2", ["71.17", "13.36", "36.95"]),
    ("DenseNet-121", ["74.16", "46.89", "63.59"]),
  ):
    assert published_table(page, f"Table 3: {network}")[0]["gaussian"] == row
  assert published_table(page, "Table 4: J\\_KL")[0]["svhn"] == ["0.182"]
  assert page.count("**The paper's Table") == 7


def test_numbers_that_a_report_shows_are_not_shown_again() -> None:
  cell = {"values": [], "seeds": [], "unit": "%", "protocol": None, "seconds": 0.0}

  def report(study: str, cells: dict[str, dict[str, float]]) -> Stored:
    rows = {row: {column: {**cell, "paper": value} for column, value in of.items()} for row, of in cells.items()}
    return Stored("a", {"study": study, "tables": [{"cells": rows}]})

  given = report("table2_cifar", {"real": {"4w4a": 64.52, "KD-4w4a": 81.7}, "bns": {"4w4a": 61.0}})
  shown = {known.table.title.split(",")[0]: known.table for known in published.unmeasured("table2_cifar", [given])}
  wide = shown["Table 2: WRN-28-10"]
  assert ("real", "4w4a") not in wide.paper
  assert wide.paper["bns", "4w4a"] == 61.48  # another number is another network's
  assert "real" in wide.rows  # for its 200 images a class
  assert shown["Table 2: ResNet-44"].paper["real", "4w4a"] == 89.19
  given = report("table4_similarity", {"MNIST": {"any@cifar10": 0.151}, "STL-10": {"any@cifar10": 0.031}})
  (similarity,) = published.unmeasured("table4_similarity", [given])
  assert similarity.table.rows == ("train", "cifar100", "svhn", "random", "fgsm")
  every = {"1": {"KD": 76.32}, "10": {"KD": 81.12}, "100": {"KD": 80.16}, "1000": {"KD": 84.03}, "2000": {"KD": 85.41}}
  (ablation,) = published.unmeasured("table1_ablation", [report("table1_ablation", every)])
  assert ablation.table.columns == ("KD+IQ+Mix",)
  assert published.unmeasured("figure7_bias", []) == []


def test_words_take_their_numbers_from_the_reports(tmp_path: pathlib.Path) -> None:
  report = stored(tmp_path, "table2_cifar", "kept")
  page = render([report], {"table2_cifar": "Real images reach {{kept | real | 4w4a*}}, J_KL {{kept|real|J_KL}}."})
  assert "Real images reach 91.00 ± 1.41 (2), J_KL 0.04190." in page, "no number of seeds where there is one"
  for reference in ("{{kept | bns | 4w4a*}}", "{{kept | real | 8w8a}}", "{{other | real | 4w4a*}}"):
    with pytest.raises(KwjaxError, match=r"table2_cifar\.md names .* which was not measured"):
      render([report], {"table2_cifar": reference})


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("/data/set/cifar10.npz:test", "cifar10.npz:test"),
    ("cifar10=../data/x.npz:train", "cifar10=x.npz:train"),
    ("~/nets/resnet44 and ./here", "resnet44 and here"),
    ("tfds:/data/cifar10:test", "tfds:cifar10:test"),
    ("(/data/x.npz)", "(x.npz)"),
    ("first/last 8w8a, 1 / 2, images/min", "first/last 8w8a, 1 / 2, images/min"),
    ("https://arxiv.org/abs/1912.01274", "https://arxiv.org/abs/1912.01274"),
    ("networks/resnet44", "networks/resnet44"),
  ],
)
def test_places_are_cut_off_paths(text: str, expected: str) -> None:
  assert results_store.neutral({"a": [text]}) == {"a": [expected]}


@pytest.mark.parametrize(
  ("break_it", "more", "message"),
  [
    (lambda run: (run / "report.json").unlink(), [], "cannot read"),
    (lambda run: (run / "report.json").write_text("{"), [], "is no JSON"),
    (lambda run: (run / "settings.json").write_text("{}"), [], "is no folder of a study"),
    (
      lambda run: (run / "settings.json").write_text('{"study": "other"}'),
      [],
      "is of the study 'other', which has no section; known: table1",
    ),
    (lambda run: None, ["--figures", "no.png"], "has no figure no.png; there are: table-0.png"),
  ],
)
def test_what_cannot_be_kept_is_one_sentence(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], break_it: Any, more: list[str], message: str
) -> None:
  run = finished_run(tmp_path / "run")
  break_it(run)
  out = tmp_path / "docs" / "results.md"
  assert results_page.main(["--collect", str(run), "--out", str(out), *more]) == 2
  assert message in capsys.readouterr().err.splitlines()[-1]
  assert not list(tmp_path.glob("docs/results/*.json"))
  assert not out.exists()


def test_a_damaged_report_is_named(tmp_path: pathlib.Path) -> None:
  (tmp_path / "x.json").write_text('{"study": "table2_cifar"}')
  with pytest.raises(KwjaxError, match=r"x\.json is no kept report: it lacks network"):
    results_store.read(tmp_path)
