"""The code of README.md and of the documentation: Python blocks run, commands have the modules and options they name.

A page is a program: its ```python blocks run in order in one namespace, in a folder of their own that holds what pages take as
given (small networks under the names that the pages use). `kwjax.synthesize`, `kwjax.distill` and `kwjax.compress` do two
steps on a few images, whatever the page asks for. What a page needs besides stands in it, unseen by readers:

    <!-- test
    np.savez("check.npz", ...)
    -->
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import tyro

import kwjax
from kwjax.models import ModelInfo, register_model, registry
from kwjax.quantization import WEIGHT_SCHEMES
from kwjax.synthesis import OWN_SCHEMES
from tests.docs.pages import ROOT, Command, blocks, commands, name, pages

_IMAGES = 8
_STEPS = 2
_OWN = ("experiments", "benchmarks", "weights_conversion", "kwjax")


class SmallNet(nn.Module):
  """Has the layers that pages name, and little to compile."""

  num_classes: int = 10

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    for layer, width in (("layer1_0", 4), ("layer3_0", 8)):
      x = nn.Conv(width, (3, 3), strides=2, use_bias=False, name=layer)(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"{layer}_bn")(x))
    return nn.Dense(self.num_classes, name="linear")(x.mean((1, 2)))


_ARCH = "small_net_of_the_docs"
_SHAPE = (8, 8, 3)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """What pages take as given: `networks/resnet20`, and the end of a run of the main job in `runs/first`."""
  folder = tmp_path_factory.mktemp("docs")
  module, random = SmallNet(), np.random.default_rng(0)
  shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *_SHAPE), np.float32))
  # Positive numbers are variances, too.
  variables = jax.tree.map(lambda leaf: random.uniform(0.05, 0.15, leaf.shape).astype(np.float32), shapes)
  means = {"input_mean": [0.5] * 3, "input_std": [0.25] * 3}
  network = kwjax.Network(module, variables, image_shape=_SHAPE, **means, name="resnet20", arch=_ARCH)
  kwjax.save_network(network, folder / "networks" / "resnet20")
  rules = kwjax.QuantRules.parse("4w4a", first_last="8w8a", weights="affine0")
  ranges = kwjax.Ranges(dict.fromkeys(rules.resolve(network), (-1.0, 1.0)))
  kwjax.save_quantized(kwjax.quantize(network, rules, ranges), folder / "runs" / "first" / "quantized")
  return folder


def _short_synthesis(network: Any, config: kwjax.SynthesisConfig, *, num_images: int, **options: Any) -> Any:
  # Dead leaves take as long to compile as everything else.
  short = config.with_steps(min(config.steps, _STEPS)).replace(
    batch_size=min(config.batch_size, _IMAGES), init="uniform"
  )
  return _synthesize(network, short, num_images=min(num_images, _IMAGES), **{**options, "progress": False})


def _short_distillation(student: Any, teacher: Any, images: Any, config: kwjax.DistillConfig, **options: Any) -> Any:
  short = dataclasses.replace(config, steps=min(config.steps, _STEPS), warmup_steps=0, batch_size=_IMAGES)
  return _distill(student, teacher, images, short, **options)


def _short_compress(network: Any, *args: Any, **options: Any) -> Any:
  config = kwjax.SynthesisConfig.for_network("bns", image_size=_SHAPE[0]).with_steps(_STEPS)
  config = config.replace(batch_size=_IMAGES, init="uniform")
  short = {"config": config, "num_images": _IMAGES, "held_out": _IMAGES, "finetune": False, "progress": False}
  return _compress(network, *args, **{**options, **short})


_synthesize, _distill, _compress = kwjax.synthesize, kwjax.distill, kwjax.compress


@pytest.fixture
def workplace(given: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
  """The folder a page runs in; what it registers is forgotten afterwards."""
  shutil.copytree(given, tmp_path, dirs_exist_ok=True)
  monkeypatch.chdir(tmp_path)
  # With a place that the user has chosen the experiments leave the compilation cache alone.
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
  monkeypatch.setattr(kwjax, "synthesize", _short_synthesis)
  monkeypatch.setattr(kwjax, "distill", _short_distillation)
  monkeypatch.setattr(kwjax, "compress", _short_compress)
  tables: tuple[dict[str, Any], ...] = (registry._TABLE, OWN_SCHEMES, WEIGHT_SCHEMES)
  kept = [dict(table) for table in tables]
  info = ModelInfo(_ARCH, "small", _SHAPE, 10, (0.5,) * 3, (0.25,) * 3, 0.9, 1e-5, "for the pages")
  register_model(info, SmallNet)
  yield
  for table, before in zip(tables, kept, strict=True):
    table.clear()
    table.update(before)


def _with(language: str) -> list[pathlib.Path]:
  return [page for page in pages() if any(block.language == language for block in blocks(page.read_text()))]


@pytest.mark.parametrize("page", _with("python"), ids=name)
@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_python_blocks_run(page: pathlib.Path) -> None:
  namespace: dict[str, Any] = {"__name__": "__main__", "np": np, "kwjax": kwjax}
  before = set(namespace)
  for block in blocks(page.read_text()):
    if block.language in ("python", "test"):
      # Line numbers of a traceback are then those of the page.
      exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
  assert set(namespace) - before - {"__builtins__"}, "no block has left a name"


class _ParsedError(Exception):
  """A command line was read without complaint."""


def _then_stop(parse: Callable[..., Any]) -> Callable[..., Any]:
  def wrapped(*args: Any, **options: Any) -> Any:
    parse(*args, **options)
    raise _ParsedError

  return wrapped


def check_command(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
  """Let the command's own parser read it, and stop there."""
  module = importlib.import_module(command.module)
  if hasattr(module, "__path__"):
    module = importlib.import_module(f"{command.module}.__main__")
  with monkeypatch.context() as patched:
    patched.setattr(tyro, "cli", _then_stop(tyro.cli))
    patched.setattr(argparse.ArgumentParser, "parse_args", _then_stop(argparse.ArgumentParser.parse_args))
    try:
      status = module.main(list(command.args))
    except _ParsedError:
      return
    except SystemExit as stop:
      status = stop.code
  assert status in (0, None), f"python -m {command.module} {' '.join(command.args)}: status {status}"


@pytest.mark.parametrize("page", _with("bash"), ids=name)
def test_commands_have_the_options_they_use(page: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  for block in blocks(page.read_text()):
    for command in commands(block.code) if block.language == "bash" else ():
      if command.module.split(".")[0] in _OWN:
        check_command(command, monkeypatch)


def test_wrong_commands_are_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
  (split,) = commands(
    'gcloud ssh --command \\\n "cd x && .venv/bin/python -m experiments.cifar_bns --no-such 1"  # why'
  )
  assert split == Command("experiments.cifar_bns", ("--no-such", "1"))
  for args in (split.args, ("--steps",), ("--steps", "many")):
    with pytest.raises(AssertionError, match="status"):
      check_command(Command("experiments.cifar_bns", args), monkeypatch)
  with pytest.raises(AssertionError, match="status"):
    check_command(Command("weights_conversion", ("--arch", "resnet20")), monkeypatch)
  assert "no-such" in capsys.readouterr().err
  with pytest.raises(ModuleNotFoundError):
    check_command(Command("experiments.no_such", ()), monkeypatch)
  check_command(Command("experiments.cifar_bns", ("--bits", "4w4a", "8w8a", "--dry-run")), monkeypatch)
  compress, export = commands("kwjax compress --no-such 1 && kwjax export --format onnx  # both")
  assert export == Command("kwjax", ("export", "--format", "onnx"))
  with pytest.raises(AssertionError, match="status"):
    check_command(compress, monkeypatch)


@pytest.mark.parametrize("page", pages(), ids=name)
def test_modules_named_in_the_text_exist(page: pathlib.Path) -> None:
  dotted = rf"\b(?:{'|'.join(_OWN)})(?:\.[a-z_0-9]+)+\b"
  for found in re.findall(rf"`(?:python -m )?({dotted})[^`]*`", page.read_text()):
    parts = found.split(".")
    value = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
      inner = ".".join(parts[:i])
      if not hasattr(value, part):
        assert (ROOT / inner.replace(".", "/")).exists() or importlib.util.find_spec(inner), f"{page}: no {found}"
        value = importlib.import_module(inner)
      else:
        value = getattr(value, part)
