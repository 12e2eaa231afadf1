"""The report: fixed keys, strict JSON, a page that needs nothing else and says only what was measured."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import math
import pathlib
import re
from typing import Any

import numpy as np
import PIL.Image
import pytest

from kwjax.errors import KwjaxError
from kwjax.runtime.evaluate import Accuracy, Agreement, wilson_interval
from kwjax.runtime.reporting.html import summary
from kwjax.runtime.reporting.report import Picture, Tile, command_line, complete, versions, write_report

FIXED = [
  "network",
  "protocol",
  "seed",
  "float",
  "jkl",
  "synthesis",
  "calibrated",
  "distilled",
  "agreement",
  "versions",
  "command",
]


def _report() -> dict[str, object]:
  return {
    "network": "resnet20",
    "seed": 3,
    "protocol": {"scheme": "bns", "steps": np.int32(200)},
    "float": Accuracy(0.9341, 0.998, 1017),
    "jkl": {"start": np.float32(0.5), "final": 0.0125, "per_layer": {"bn_a": 0.002, "bn_b": 0.03}},
    "synthesis": {"images": 512, "seconds": 321.5},
    "calibrated": {"8w8a": {"bns": {"top1": 0.9331, "std": 0.001, "seeds": 3}}, "4w4a": {"bns": {"top1": 0.5}}},
    "agreement": {"4w4a": {"bns": Agreement(0.91, 0.08, 14.2, 1017)}},
    "command": "python -m experiments.cifar_bns --network a&b",
    "extra": [1, 2],
  }


class _Page(html.parser.HTMLParser):
  """Tags, attributes and text of a page; the text of each table row by its cells."""

  def __init__(self, text: str) -> None:
    super().__init__()
    self.tags: list[str] = []
    self.attributes: list[tuple[str, str | None]] = []
    self.rows: list[list[str]] = []
    self.data = ""
    self.open: list[str] = []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in ("meta", "img"):
      self.open.append(tag)
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self.rows[-1].append("")

  def handle_endtag(self, tag: str) -> None:
    assert self.open.pop() == tag

  def handle_data(self, data: str) -> None:
    self.data += data if "style" not in self.open else ""
    if "tr" in self.open and self.rows[-1]:
      self.rows[-1][-1] += data


def _page(folder: pathlib.Path) -> _Page:
  return _Page((folder / "report.html").read_text())


def test_every_fixed_key_is_there_in_order_and_unknown_ones_stay() -> None:
  full = complete({})
  assert full == dict.fromkeys(FIXED)
  full = complete(_report())
  assert list(full) == [*FIXED, "extra"]
  assert full["float"] == {"top1": 0.9341, "count": 1017, "top5": 0.998}
  assert full["jkl"]["start"] == 0.5
  assert full["synthesis"] == {"images": 512, "steps": None, "seconds": 321.5, "images_per_minute": None}
  assert full["calibrated"]["4w4a"] == {"bns": {"top1": 0.5, "std": None, "seeds": None}}
  assert full["distilled"] is None


def test_the_json_is_strict_and_non_finite_numbers_are_noted(tmp_path: pathlib.Path) -> None:
  report = {
    **_report(),
    "jkl": {"start": math.nan, "final": np.float32(np.inf)},
    "agreement": {"8w8a": Agreement(1.0, 0.0, math.inf, 10)},
    "curve": np.array([1.0, np.nan]),
    "notes": "by hand",
  }
  write_report(report, tmp_path)
  full = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
  assert full["jkl"] == {"start": None, "final": None, "per_layer": None}
  assert full["curve"] == [1.0, None]
  assert [note.split(",")[0] for note in full["notes"]] == [
    "by hand",
    "jkl.start was nan",
    "jkl.final was inf",
    "agreement.8w8a.sqnr_db was inf",
    "curve[1] was nan",
  ]
  rows = _page(tmp_path).rows
  assert ["start", "nan"] in rows
  assert ["8w8a", "100.00 %", "72.2 to 100.0 %", "0", "inf", "10"] in rows


@pytest.mark.parametrize(
  ("part", "message"),
  [
    ({"float": 0.93}, r"report: float must be a mapping, found 0\.93"),
    ({"float": {"top1": 93.4}}, r"report: float\.top1 must be a fraction in \[0, 1\], found 93\.4"),
    ({"calibrated": {"4w4a": 0.9}}, r"calibrated\.4w4a must be a mapping"),
    ({"distilled": {"4w4a": {"bns": {"top1": 12}}}}, r"distilled\.4w4a\.bns\.top1 must be a fraction"),
    ({"protocol": {"f": object()}}, r"protocol\.f holds a object, which has no JSON form"),
  ],
)
def test_a_report_of_another_form_is_refused(tmp_path: pathlib.Path, part: dict[str, object], message: str) -> None:
  with pytest.raises(KwjaxError, match=message):
    write_report(part, tmp_path)
  assert not list(tmp_path.iterdir())


def test_the_page_shows_the_numbers_with_their_intervals(tmp_path: pathlib.Path) -> None:
  path = write_report(_report(), tmp_path, tables={"Readings": [{"a": 1, "b": None}, {"a": 2, "c": "x"}]})
  assert path == tmp_path / "report.html"
  page = _page(tmp_path)
  low, high = wilson_interval(0.9331 * 1017, 1017)
  assert ["float", "", "93.41 %", "91.7 to 94.8 %", "", ""] in page.rows
  assert [
    "8w8a, calibrated",
    "bns",
    "93.31 %",
    f"{100 * low:.1f} to {100 * high:.1f} %",
    "0.10 points",
    "3",
  ] in page.rows
  assert ["distilled", "", "not measured", "", "", ""] in page.rows
  assert ["4w4a", "bns", "91.00 %", "89.1 to 92.6 %", "0.08", "14.2", "1017"] in page.rows
  assert ["worst layer: bn_b", "0.03"] in page.rows
  assert ["1", "not measured", "not measured"] in page.rows
  assert ["images_per_minute", "not measured"] in page.rows
  assert (
    "The float network has 93.41 % top-1 on 1,017 images; 4w4a calibrated with bns images has 50.00 %; "
    "J_KL of the synthesised images went from 0.5 to 0.0125; 512 images were made in 321.5 s."
  ) in page.data
  assert "python -m experiments.cifar_bns --network a&b" in page.data


def test_channels_that_own_the_divergence_are_named_beside_it(tmp_path: pathlib.Path) -> None:
  of_all = {
    "jkl": 20.3,
    "without_input": 20.7,
    "trimmed": 0.11,
    "outliers": 27,
    "channels": 21008,
    "outlier_nats": 10.0,
  }
  jkl = {
    "start": 3773.0,
    "final": 20.3,
    "start_trimmed": 0.5,
    "final_trimmed": 0.11,
    "per_layer": {},
    "sets": {"bns": of_all},
  }
  write_report({**_report(), "jkl": jkl}, tmp_path)
  page = _page(tmp_path)
  shown = "went from 0.5 to 0.11 without outliers (from 3773 to 20.3 with them)"
  assert f"J_KL of the synthesised images {shown}" in page.data
  assert [
    "images",
    "J_KL (nats)",
    "without input",
    "without outliers",
    "outliers (channels above 10 nats)",
  ] in page.rows
  assert ["bns", "20.3", "20.7", "0.11", "27 of 21,008"] in page.rows


def test_an_empty_report_says_that_nothing_was_measured(tmp_path: pathlib.Path) -> None:
  write_report({}, tmp_path)
  page = _page(tmp_path)
  assert "Nothing was measured." in page.data
  assert not re.search(r"\d\.\d+ %", page.data)
  assert "Not measured: the run had no labelled images." in page.data
  absent = "Agreement with the float network; Similarity to the training data (J_KL); Cost of the synthesis; Command"
  assert f"Not measured in this run: {absent}; Versions." in page.data


def test_no_interval_without_a_number_of_images(tmp_path: pathlib.Path) -> None:
  write_report({"float": {"top1": 0.5}}, tmp_path)
  assert ["float", "50.00 %", "number of images unknown"] in _page(tmp_path).rows


def test_the_page_holds_its_pictures_and_asks_for_nothing(tmp_path: pathlib.Path) -> None:
  PIL.Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
  write_report(_report(), tmp_path, figures={"A <b> & c": tmp_path / "a.png"})
  page = _page(tmp_path)
  assert page.open == []
  assert not {"script", "link", "iframe", "object", "b"} & set(page.tags)
  sources = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
  sources = [value for value in sources if value is None or not value.startswith("#")]
  assert len(sources) == 1
  assert sources[0] is not None
  assert base64.b64decode(sources[0].removeprefix("data:image/png;base64,")) == (tmp_path / "a.png").read_bytes()
  text = (tmp_path / "report.html").read_text()
  assert "http" not in text.replace("http-equiv", "")
  assert "default-src 'none'" in text
  assert not re.search(r"url\(|@import", text)
  assert "prefers-color-scheme: dark" in text
  assert 'name="viewport"' in text


def test_every_text_of_a_run_is_escaped(tmp_path: pathlib.Path) -> None:
  evil = "<script>alert(1)</script>\"'"
  PIL.Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
  report: dict[str, Any] = {
    "network": {"name": evil},
    "protocol": {evil: {evil: [evil]}},
    "float": {"top1": 0.5, "count": 2},
    "jkl": {"start": 1, "final": 1, "per_layer": {evil: 1.0}},
    "synthesis": {evil: evil},
    "calibrated": {evil: {evil: {"top1": 0.5}}},
    "agreement": {evil: {evil: {"top1": 0.5}}, evil * 2: evil},
    "versions": {evil: evil},
    "command": evil,
    "notes": [evil],
  }
  report["classes"] = {"counts": {evil: 1}}
  report["jkl"]["sets"] = {evil: {"jkl": evil}}
  shown = {"a": Picture(tmp_path / "a.png", evil, evil), evil: tmp_path / "a.png"}
  write_report(report, tmp_path, figures=shown, tables={evil: [{evil: evil}]}, images=[Tile(np.zeros((2, 2, 1)), evil)])
  page = _page(tmp_path)
  assert "script" not in page.tags
  assert page.data.count("alert(1)") > 18
  assert sorted(value or "" for name, value in page.attributes if name == "alt") == sorted(
    [evil, f"a. {evil}", f"image 1: {evil}"]
  )


def test_a_missing_or_foreign_figure_is_named(tmp_path: pathlib.Path) -> None:
  with pytest.raises(KwjaxError, match=r"cannot read the figure .*no\.png"):
    write_report({}, tmp_path, figures={"a": tmp_path / "no.png"})
  (tmp_path / "b.png").write_bytes(b"GIF89a")
  with pytest.raises(KwjaxError, match=r"b\.png is not a PNG"):
    write_report({}, tmp_path, figures={"a": tmp_path / "b.png"})
  assert not (tmp_path / "report.json").exists()


def test_versions_and_command_are_those_of_this_process() -> None:
  found = versions()
  assert json.loads(json.dumps(found)) == found
  assert found["jax"] == __import__("jax").__version__
  assert found["flax"] == __import__("flax").__version__
  assert {"python", "kwjax", "platform", "device", "cpu_count"} <= found.keys()
  assert found["cpu_count"] >= 1
  assert command_line().startswith("python ")


def test_without_labels_the_summary_speaks_of_agreement() -> None:
  agreement = {"8w8a": {"bns": {"held_out": {"top1": 0.975}}}, "4w4a": {"bns": {"held_out": {"top1": 0.5}}}}
  text = summary(complete({"network": "net", "agreement": agreement}))
  assert "agree with the float network on held-out images: 8w8a 97.50 %, 4w4a 50.00 %" in text


def test_pictures_stand_in_their_section_with_a_caption(tmp_path: pathlib.Path) -> None:
  PIL.Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
  shown = {"Bars": Picture(tmp_path / "a.png", "Higher is better.", "accuracy"), "Rest": tmp_path / "a.png"}
  write_report(_report(), tmp_path, figures=shown)
  text = (tmp_path / "report.html").read_text()
  assert (
    text.index(">Accuracy</h2>")
    < text.index("<b>Bars.</b> Higher is better.")
    < text.index(">Similarity to the")
    < text.index(">Figures</h2>")
    < text.index("<figcaption>Rest<")
  )


def test_every_link_of_the_page_leads_to_a_section(tmp_path: pathlib.Path) -> None:
  write_report({**_report(), "notes": ["a"]}, tmp_path, tables={"Table (1): a & b": [{"a": 1}]})
  attributes = _page(tmp_path).attributes
  targets = [(value or "")[1:] for name, value in attributes if name == "href"]
  assert targets == [value for name, value in attributes if name == "id"]
  assert targets[0] == "table--1---a---b"


def test_images_keep_their_pixels_and_say_what_they_show(tmp_path: pathlib.Path) -> None:
  image = np.random.default_rng(0).random((4, 5, 3))
  write_report({"synthesis": {"images": 1200}}, tmp_path, images=[Tile(image, "ship, 93%"), Tile(image * 2 - 0.5)])
  page = _page(tmp_path)
  assert "The first 2 of the 1,200 images that were made, each with what the float network says it shows." in page.data
  assert [value for name, value in page.attributes if name == "alt"] == ["image 1: ship, 93%", "image 2"]
  sources = [value or "" for name, value in page.attributes if name == "src"]
  for source, expected in zip(sources, (image, np.clip(image * 2 - 0.5, 0, 1))):
    with PIL.Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))) as found:
      np.testing.assert_array_equal(np.asarray(found), np.round(expected * 255).astype(np.uint8))
  with pytest.raises(KwjaxError, match=r"must be \[h,w,1\] or \[h,w,3\], found \[4, 5, 2\]"):
    write_report({}, tmp_path, images=[Tile(image[..., :2])])


def test_few_classes_are_listed_and_many_are_counted(tmp_path: pathlib.Path) -> None:
  few = {"cat": 3, "dog": 0, "ship": 1}
  write_report({"classes": {"counts": few, "effective": 1.75, "confidence": 0.5, "aimed": 0.25}}, tmp_path)
  page = _page(tmp_path)
  assert page.rows[-4:-1] == [["cat", "3", ""], ["dog", "0", ""], ["ship", "1", ""]]
  assert "puts the 4 images into 2 of its 3 classes, as evenly as 1.8 equally frequent classes would be" in page.data
  assert "25.00 % of them are what they were made to be" in page.data
  assert [value for name, value in page.attributes if name == "style"] == ["width:100.0%", "width:0.0%", "width:33.3%"]

  many = {f"class {i}": (i < 7) + (i < 2) for i in range(1000)}
  write_report({"classes": {"counts": many}}, tmp_path)
  page = _page(tmp_path)
  assert ["class 0", "2", ""] in page.rows
  assert page.rows[-4:-1] == [["0 images", "993", ""], ["1 image", "5", ""], ["2 images", "2", ""]]
  assert len(page.rows) < 20
  assert page.rows[-1] == ["seed", "not measured"]


def test_without_anything_else_the_summary_names_the_tables_that_hold_numbers() -> None:
  report = complete({"network": "net"})
  rows = {
    "Spread": [{"": "a", "x": None}, {"": "b", "x": "0.5 (1)"}],
    "Later": [{"": "a", "x": "not measured; paper 2"}],
  }
  assert summary(report, rows) == "Spread."
  assert summary(report, {"Later": rows["Later"]}) == summary(report) == "Nothing was measured."
