"""Training of a reference network as a user runs it, at the smallest size: network, report, resuming, refusals."""

from __future__ import annotations

import gzip
import json
import pathlib
import struct
from typing import Any

import numpy as np
import pytest

import kwjax
from experiments import train_reference
from experiments.train_reference import architecture, channel_statistics, main
from kwjax.runtime.data import load_data


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Forty training and twenty test images of 28x28 in idx form."""
  folder = tmp_path_factory.mktemp("digits") / "mnist"
  folder.mkdir()
  rng = np.random.default_rng(0)
  for prefix, count in (("train", 40), ("t10k", 20)):
    labels = np.arange(count, dtype=np.uint8) % 3
    images = rng.integers(0, 80, (count, 28, 28)).astype(np.uint8) + 80 * labels[:, None, None]
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
      header = struct.pack(f">{array.ndim + 1}I", 0x800 + array.ndim, *array.shape)
      (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
  return folder


def arguments(digits: pathlib.Path, tmp_path: pathlib.Path, *more: str) -> list[str]:
  common = ["--data", str(digits), "--eval-data", str(digits), "--preset", "smoke", "--devices", "1"]
  places = ["--out", str(tmp_path / "net"), "--workdir", str(tmp_path / "run")]
  return [*common, *places, "--arch", "resnet8", *more]


def test_a_run_leaves_a_network_that_loads_and_a_second_one_does_nothing(
  digits: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  monkeypatch.setenv("KWJAX_CACHE", str(tmp_path / "cache"))
  assert main(arguments(digits, tmp_path)) == 0
  assert "95 % interval" in capsys.readouterr().err
  network = kwjax.load_network(tmp_path / "net")
  assert (network.name, network.arch, network.num_classes, network.image_shape) == (
    "resnet8_mnist",
    "resnet20",
    3,
    (32, 32, 1),
  )
  assert len(kwjax.reference_moments(network)) == 7
  pixels = load_data(f"{digits}:train", image_shape=(32, 32, 1)).all()[0]
  np.testing.assert_allclose(network.input_mean, pixels.mean(), rtol=1e-5)
  np.testing.assert_allclose(network.input_std, pixels.std(), rtol=1e-5)

  report = json.loads((tmp_path / "run" / "report.json").read_text())
  test = load_data(str(digits), image_shape=(32, 32, 1))
  assert report["float"]["count"] == 20
  assert report["float"]["top1"] == pytest.approx(kwjax.evaluate(network, test).top1)
  assert not report["protocol"]["settings"]["augmentation"]["flip"], "digits are not mirrored"
  assert network.source["accuracy"]["top1"] == report["float"]["top1"]

  def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("trained a step, or evaluated, again")

  monkeypatch.setattr("kwjax.sources.run.compiled_step", refuse)
  monkeypatch.setattr(train_reference, "evaluate", refuse)
  before = (tmp_path / "net" / "model.safetensors").read_bytes()
  assert main(arguments(digits, tmp_path)) == 0
  assert (tmp_path / "net" / "model.safetensors").read_bytes() == before
  assert main(arguments(digits, tmp_path, "--seed", "1")) == 2
  assert "seed is 0 there and 1 now" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("more", "text"),
  [
    (("--arch", "resnet9"), "unknown model 'resnet9'"),
    (("--epochs", "0"), "--epochs must be at least 1, found 0"),
    (("--pad", "-1"), "--pad must not be negative"),
    (("--learning-rate", "nan"), "learning_rate must be a positive number"),
    (("--data", "nowhere.npz"), "nowhere.npz"),
  ],
)
def test_mistakes_are_one_sentence_and_status_2(
  digits: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], text: str
) -> None:
  given = arguments(digits, tmp_path)
  for name, value in zip(more[::2], more[1::2], strict=True):
    given = (
      [*given, name, value]
      if name not in given
      else [value if i and given[i - 1] == name else part for i, part in enumerate(given)]
    )
  assert main(given) == 2
  message = capsys.readouterr().err
  assert message.startswith("error: ")
  assert text in message


def test_architectures() -> None:
  assert architecture("resnet8") == ("resnet20", {"blocks_per_stage": 1})
  assert architecture("resnet20") == ("resnet20", {})
  assert architecture("resnet18") == ("resnet18", {}), "ImageNet's, though 18 - 2 divides by 4 only"


def test_channel_statistics_are_exact() -> None:
  images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3)).astype(np.uint8)
  mean, std = channel_statistics(images)
  np.testing.assert_allclose(mean, (images / 255.0).mean((0, 1, 2)), rtol=1e-12)
  np.testing.assert_allclose(std, (images / 255.0).std((0, 1, 2)), rtol=1e-12)
  with pytest.raises(kwjax.KwjaxError, match="the same value everywhere"):
    channel_statistics(images * 0)
