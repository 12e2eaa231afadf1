"""The main job in two processes: the numbers of one process, one report, bad options in one sentence."""

from __future__ import annotations

import json
import os
import pathlib

import numpy as np
import pytest

from experiments import cifar_bns
from kwjax.runtime.files import read_sealed_json
from kwjax.synthesis.store import ImageStore, StoredImages
from tests.multi_process.prepare import write_inputs
from tests.multi_process.runs import ended, started

QUANTIZED = (".calibrated", ".distilled", ".agreement")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("experiment")
  write_inputs(folder)
  return folder


def arguments(folder: pathlib.Path, name: str) -> list[str]:
  """Odd numbers throughout: 9 images in batches of 5 and 4, 2 held out, 11 labelled, fine-tuning batches of 5."""
  inputs = [
    "--network",
    str(folder / "network"),
    "--eval-data",
    str(folder / "data.npz"),
    "--workdir",
    str(folder / name),
  ]
  sizes = ["--images", "7", "--held-out", "2", "--batch-size", "5", "--distill-batch-size", "5", "--bits", "8w8a"]
  # A rate at which fine-tuning changes much: whether it is kept must not hang on the order of a sum.
  return [*inputs, "--preset", "smoke", *sizes, "--distill-learning-rate", "0.3"]


def stored(workdir: pathlib.Path) -> StoredImages:
  manifest = read_sealed_json(workdir / "synthesis" / "images" / "manifest.json")
  return ImageStore(workdir / "synthesis" / "images", settings=manifest["settings"]).images()


def close(one: object, two: object, where: str = "") -> None:
  """Equal structure and text, numbers to a hundred thousandth; what quantized networks answer only nearly.

  Two orders of summation differ in the seventh digit; at a rounding boundary that becomes a whole step of the grid, which
  turns the answer to one image in eleven at times, and after some steps of fine-tuning the copy itself.
  """
  if isinstance(one, dict):
    assert one.keys() == two.keys(), where
    for key in one:
      close(one[key], two[key], f"{where}.{key}")
  elif isinstance(one, float) and where.startswith(QUANTIZED):
    if where.endswith(".top1") and "held_out" not in where:
      assert two == pytest.approx(one, abs=1.01 / 11), where
  elif where == ".classes.confidence":
    assert two == pytest.approx(one, rel=1e-3), where  # the exponential of logits multiplies what images differ by
  elif isinstance(one, float):
    assert two == pytest.approx(one, rel=1e-5, abs=1e-7), where
  else:
    assert one == two, where


@pytest.mark.slow
def test_the_report_of_two_processes_is_that_of_one(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("KWJAX_CACHE", str(folder / "cache"))
  both = lambda address, index: [
    *arguments(folder, "two"),
    *("--devices", "2", "--coordinator", address, "--num-processes", "2", "--process-id", str(index)),
  ]
  with started(cifar_bns.main, both, folder / "cache", folder / "logs") as running:
    statuses, outputs = ended(running, folder / "logs")
  assert statuses == [0, 0], outputs
  assert "done: " in outputs[0]
  assert "done: " not in outputs[1] and "step/s" not in outputs[1], "one process speaks"
  assert cifar_bns.main(arguments(folder, "one")) == 0

  one, two = (json.loads((folder / name / "report.json").read_text()) for name in ("one", "two"))
  for report in (one, two):
    for measured in ("seconds", "images_per_minute"):
      del report["synthesis"][measured]
    del report["command"], report["versions"]
  assert two["float"]["count"] == 11
  close(one, two)
  for name in ("bns", "gaussian"):
    tables = [read_sealed_json(folder / run / "stages" / f"ranges-{name}.json")["result"] for run in ("one", "two")]
    for layer, ends in tables[0].items():
      np.testing.assert_allclose(tables[1][layer], ends, rtol=1e-5, atol=1e-5)
  images = [stored(folder / name) for name in ("one", "two")]
  assert images[1].images.shape == (9, 8, 8, 3)
  np.testing.assert_allclose(images[1].images, images[0].images, atol=1e-4)
  np.testing.assert_array_equal(images[1].labels, images[0].labels)

  # What two processes have made, one goes on with: nothing is left to do.
  stamps = {path: path.stat().st_mtime_ns for path in (folder / "two" / "stages").iterdir()}
  assert cifar_bns.main(arguments(folder, "two")) == 0
  assert {path: path.stat().st_mtime_ns for path in (folder / "two" / "stages").iterdir()} == stamps
  assert os.listdir(folder / "two" / "synthesis") == os.listdir(folder / "one" / "synthesis")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--num-processes", "2"], "belong together: --coordinator, --process-id missing"),
    (["--coordinator", "host", "--num-processes", "2", "--process-id", "0"], "HOST:PORT such as 10.0.0.1:1234"),
    (["--coordinator", "h:1", "--num-processes", "2", "--process-id", "2"], "below --num-processes 2, found 2"),
    (["--coordinator", "h:1", "--num-processes", "0", "--process-id", "0"], "--num-processes must be at least 1"),
  ],
)
def test_bad_combinations_are_one_sentence(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
  assert cifar_bns.main([*arguments(folder, "bad"), *options]) == 2
  assert message in capsys.readouterr().err
  assert not (folder / "bad").exists()
