"""The main job as a user runs it, at the smallest size: report, resuming, refusals."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cifar_bns, imagenet_bns
from kwjax.errors import CheckpointError
from kwjax.models import get_model, model_info
from kwjax.network import Network, load_network, save_network
from kwjax.quantization import load_integer_weights, load_quantized
from kwjax.runtime.reporting.tensorboard import read_events
from kwjax.runtime.result_store import ResultStore
from tests.networks import random_network

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
  """A compilation cache of the tests' own."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("KWJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield


def cifar_network(blocks_per_stage: int) -> Network:
  """A CIFAR ResNet of 6 n + 2 layers with random weights and statistics."""
  options = {"num_classes": 10, "blocks_per_stage": blocks_per_stage}
  info = model_info("resnet20")
  shaken = random_network(get_model("resnet20", **options), image_shape=info.image_shape)
  return shaken.replace(
    input_mean=info.input_mean, input_std=info.input_std, name="resnet20", arch="resnet20", model_options=options
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A ResNet of 8 layers with random weights, and labelled images, on disk."""
  folder = tmp_path_factory.mktemp("main_job")
  network = cifar_network(1)
  save_network(network, folder / "network")
  images = np.asarray(jax.random.uniform(jax.random.key(0), (12, 32, 32, 3)))
  labels = np.asarray(jnp.argmax(network.apply(images), -1))
  np.savez(folder / "data.npz", images=(images * 255).astype(np.uint8), labels=labels)
  return folder


def arguments(folder: pathlib.Path, workdir: str, *more: str) -> list[str]:
  network, data = str(folder / "network"), str(folder / "data.npz")
  # What a reconstruction adds is tested in tests/test_compress.py; here its programs would be half of the time.
  given = ["--network", network, "--eval-data", data, "--preset", "smoke", "--reconstruct-iterations", "0"]
  return [*given, "--workdir", str(folder / workdir), *more]


@pytest.fixture(scope="module")
def finished(folder: pathlib.Path) -> pathlib.Path:
  """A finished run."""
  assert cifar_bns.main(arguments(folder, "finished")) == 0
  return folder / "finished"


def test_report_has_every_key_and_nothing_invented(finished: pathlib.Path) -> None:
  report = json.loads((finished / "report.json").read_text())
  measured = ["float", "jkl", "synthesis", "calibrated", "distilled", "agreement"]
  keys = ["network", "protocol", "seed", *measured, "versions", "command"]
  assert set(keys) <= set(report)
  assert set(report["calibrated"]) == {"8w8a", "4w8a", "4w4a"}
  assert set(report["calibrated"]["8w8a"]) == {"bns", "gaussian"}
  assert report["float"]["count"] == 12
  assert report["float"]["top1"] >= 11 / 12  # the labels are the network's own; 8 bits of the file may move one
  assert report["synthesis"]["images"] == 10
  assert report["jkl"]["final"] < report["jkl"]["start"]
  assert len(report["jkl"]["per_layer"]) == 8  # 7 BatchNorm layers and the input
  assert report["distilled"]["4w4a"]["bns"]["count"] == 12
  assert {"correction of 4w4a", "fine-tuning of 4w4a", "student of 4w4a"} <= {
    row["about"] for row in report["decisions"]
  }
  assert report["agreement"]["4w4a fine-tuned"]["bns"]["held_out"]["count"] == 2


def test_page_is_self_contained_and_pictures_are_there(finished: pathlib.Path) -> None:
  page = (finished / "report.html").read_text()
  assert not re.findall(r"""(?:src|href)=["'](?!data:)[^"'#]""", page)
  assert page.count("data:image/png") == 3 + 10  # figures, and every image by itself
  assert {p.name for p in (finished / "figures").iterdir()} == {"images.png", "jkl.png", "layers.png", "precision.png"}


def test_saved_network_is_the_closer_one(finished: pathlib.Path, folder: pathlib.Path) -> None:
  saved = load_quantized(finished / "quantized")
  assert saved.rules.describe().startswith("4w4a")
  report = json.loads((finished / "report.json").read_text())
  after, before = (report["agreement"][name]["bns"]["held_out"]["kl"] for name in ("4w4a fine-tuned", "4w4a"))
  float_kernel = load_network(folder / "network").variables["params"]["conv1"]["kernel"]
  # Calibration leaves the kernels as they are.
  assert np.array_equal(saved.variables["params"]["conv1"]["kernel"], float_kernel) == (after >= before)
  assert ("fine-tuned" in report["protocol"]["saved network"]) == (after < before)


def test_the_same_command_again_computes_nothing(finished: pathlib.Path, folder: pathlib.Path) -> None:
  weights = (finished / "quantized" / "model.safetensors").read_bytes()
  stamps = {p: p.stat().st_mtime_ns for p in (finished / "stages").iterdir()}
  assert cifar_bns.main(arguments(folder, "finished")) == 0
  assert {p: p.stat().st_mtime_ns for p in (finished / "stages").iterdir()} == stamps
  assert (finished / "quantized" / "model.safetensors").read_bytes() == weights


def test_dry_run_says_what_it_would_do_and_does_nothing(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  save_network(cifar_network(3), folder / "resnet20")
  network = ("--network", str(folder / "resnet20"))
  assert cifar_bns.main(arguments(folder, "dry", *network, "--dry-run", "--steps", "7")) == 0
  text = capsys.readouterr().out
  assert "0.041 G multiply-adds" in text  # He et al. (2016): 40.8 million for ResNet-20
  assert "7 steps" in text
  assert not (folder / "dry").exists()


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (["--bits", "9w9a"], "9w9a"),
    (["--bits", "4w4a", "4w4a"], "different precisions"),
    (["--images", "0"], "--images must be at least 1"),
    (["--devices", "99"], "99 devices"),
    (["--eval-data", "nowhere.npz"], "nowhere.npz"),
    (["--arch", "resnet20"], "not both"),
    (["--real-data", "nowhere.npz"], "nowhere.npz"),
    (["--overrides", "layer9=8w8a"], "layer9"),
    (["--overrides", "layer9"], "PATTERN=BITS"),
    (["--class-names", "nowhere.txt"], "nowhere.txt cannot be read"),
  ],
)
def test_bad_input_is_one_sentence_and_status_2(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
  assert cifar_bns.main([*arguments(folder, "bad"), *more]) == 2
  errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
  assert len(errors) == 1
  assert message in errors[0]
  assert not (folder / "bad").exists()


def test_class_names_and_tensorboard_can_be_had_afterwards(
  finished: pathlib.Path, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  names = [f"sort {letter}" for letter in "abcdefghij"]
  (folder / "names.txt").write_text("\n".join(names) + "\n")
  more = ["--class-names", str(folder / "names.txt"), "--tensorboard"]
  assert cifar_bns.main(arguments(folder, "finished", *more)) == 0
  report = json.loads((finished / "report.json").read_text())
  assert list(report["classes"]["counts"]) == names
  assert sum(report["classes"]["counts"].values()) == 10
  assert "<figcaption>sort " in (finished / "report.html").read_text()
  events = read_events(finished / "tensorboard")
  assert sorted(events["synthesis/jkl"]) == sorted(events["synthesis/learning_rate"]) == [1, 2, 3]
  assert max(events["distillation/loss"]) == 2
  assert {"run/summary/text_summary", "run/protocol/text_summary", "run/images"} <= events.keys()
  (folder / "names.txt").write_text("\n".join(names[:9]))
  assert cifar_bns.main(arguments(folder, "finished", *more)) == 2
  assert "names.txt has 9 lines, but resnet20 has 10 classes" in capsys.readouterr().err
  assert cifar_bns.main(arguments(folder, "finished")) == 0


def test_other_settings_in_a_used_folder_are_refused(
  finished: pathlib.Path, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  page = (finished / "report.html").read_bytes()
  assert cifar_bns.main(arguments(folder, "finished", "--seed", "1")) == 2
  assert "seed is 0 there and 1 now" in capsys.readouterr().err
  assert (finished / "report.html").read_bytes() == page


def test_no_network_says_how_to_name_one(capsys: pytest.CaptureFixture[str]) -> None:
  assert cifar_bns.main([]) == 2
  assert "--network FOLDER" in capsys.readouterr().err
  assert imagenet_bns.main(["--weights", "x.pth"]) == 2
  assert "belong together" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
  with pytest.raises(SystemExit) as stop:
    imagenet_bns.main(["--help"])
  assert stop.value.code == 0
  text = capsys.readouterr().out
  assert "EfficientNet-Lite0" in text
  options = [
    "network",
    "arch",
    "weights",
    "scheme",
    "bits",
    "first-last",
    "images",
    "steps",
    "batch-size",
    "duplicates",
  ]
  for option in [*options, "distill-steps", "eval-data", "preset", "workdir", "resume", "seed", "devices", "dry-run"]:
    assert f"--{option}" in text


def test_float_copy_and_integer_weights(folder: pathlib.Path) -> None:
  more = [
    "--bits",
    "float",
    "4w8a",
    "--first-last",
    "none",
    "--weight-scheme",
    "affine0",
    "--distill-steps",
    "0",
  ]
  assert cifar_bns.main(arguments(folder, "integers", *more)) == 0
  report = json.loads((folder / "integers" / "report.json").read_text())
  assert report["agreement"]["float"]["bns"]["eval"]["top1"] == 1.0
  ratio = report["agreement"]["float"]["bns"]["eval"]["sqnr_db"]
  assert ratio is None or ratio > 100  # infinite, or two compilations of the same network differ in the last digits
  assert "8 of 8 layers with integer weights" in report["protocol"]["saved network"]
  assert set(load_integer_weights(folder / "integers" / "quantized")) >= {"conv1", "linear"}


def test_stages_are_computed_once_and_infinity_becomes_null(tmp_path: pathlib.Path) -> None:
  stages = ResultStore(tmp_path, {"seed": 0})
  assert stages.once("score", lambda: {"sqnr_db": float("inf"), "kl": [0.5, float("nan")]}) == {
    "sqnr_db": None,
    "kl": [0.5, None],
  }
  assert stages.once("score", lambda: pytest.fail("computed twice")) == {"sqnr_db": None, "kl": [0.5, None]}
  with pytest.raises(CheckpointError, match="seed is 0 there and 1 now"):
    ResultStore(tmp_path, {"seed": 1})


def test_no_resume_starts_over_and_spares_what_is_not_its_own(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  (folder / "mine" / "figures").mkdir(parents=True)
  assert cifar_bns.main(arguments(folder, "mine", "--no-resume")) == 2
  assert "holds none of a run" in capsys.readouterr().err
  assert (folder / "mine" / "figures").is_dir()
