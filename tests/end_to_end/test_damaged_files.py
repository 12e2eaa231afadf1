"""Every file that a run keeps, cut off and with a byte flipped: found, named, mended or refused, never believed."""
# ruff: noqa: PT017 - a damaged file may also come to no harm, so there may be no error to expect

from __future__ import annotations

import pathlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kwjax
from experiments import cifar_bns
from kwjax.errors import CheckpointError, WeightsError
from kwjax.network import fingerprint, load_network, save_network
from kwjax.network_files import DESCRIPTION_FILE, read_description
from kwjax.quantization import load_integer_weights, load_quantized, save_quantized
from kwjax.runtime.checkpoint import Checkpoints
from kwjax.runtime.files import read_sealed_json, write_sealed_json
from kwjax.runtime.result_store import ResultStore
from kwjax.runtime.workdir import LOCK_FILES
from kwjax.synthesis.store import ImageStore
from tests.end_to_end import jobs

SETTINGS = {"scheme": "bns", "rate": 0.1}


def flip(place: float) -> Callable[[bytes], bytes]:
  """Inverts one bit of the byte at that fraction of the file."""

  def flipped(content: bytes) -> bytes:
    data = bytearray(content)
    data[min(int(place * len(data)), len(data) - 1)] ^= 4
    return bytes(data)

  return flipped


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
  "emptied": lambda content: b"",
  "halved": lambda content: content[: len(content) // 2],
  "last byte lost": lambda content: content[:-1],
  "first byte flipped": flip(0),
  "byte flipped": flip(0.4),
  "last byte flipped": flip(1),
}
damages = pytest.mark.parametrize("how", DAMAGES)


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
  """Every file with content below a folder, by its path from there."""
  return sorted(
    p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.stat().st_size and p.name not in LOCK_FILES
  )


def damaged_copies(folder: pathlib.Path, work: pathlib.Path, how: str) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
  """(a copy of the folder in which one file is damaged, that file), for each file in turn."""
  for number, name in enumerate(files_of(folder)):
    copy = work / f"copy{number}"
    shutil.copytree(folder, copy)
    path = copy / name
    path.write_bytes(DAMAGES[how](path.read_bytes()))
    yield copy, name


def state(seed: int) -> dict[str, Any]:
  """Arrays of several types, one that takes more than a page, and a random key."""
  rng = np.random.default_rng(seed)
  large = jnp.asarray(rng.normal(size=(50, 40)), jnp.float32)
  return {"large": large, "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16), "key": jax.random.key(seed)}


def bits(tree: Any) -> list[bytes]:
  keys = [
    jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    for leaf in jax.tree.leaves(tree)
  ]
  return [np.asarray(leaf).tobytes() for leaf in keys]  # fmt: skip


@damages
def test_checkpoint_falls_back_to_the_step_before(tmp_path: pathlib.Path, how: str) -> None:
  with Checkpoints(tmp_path / "whole") as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state(step), settings=SETTINGS, extra={"step": step})
  fell_back = set()
  for copy, name in damaged_copies(tmp_path / "whole", tmp_path, how):
    if name.parts[0] != "2":
      continue
    with Checkpoints(copy) as checkpoints, warnings.catch_warnings(record=True) as said:
      warnings.simplefilter("always")
      found = checkpoints.restore(state(0), settings=SETTINGS)
      assert found is not None
      assert found.extra == {"step": found.step}
      # Whatever is damaged: one of the two states comes back, with all its bits.
      assert bits(found.state) == bits(state(found.step))
      if found.step == 1:
        fell_back.add(name)
        assert any(f"{copy / '2'} is damaged" in str(warning.message) for warning in said), name
      # And the run can go on from it.
      assert checkpoints.save(3, state(3), settings=SETTINGS)
      again = checkpoints.restore(state(0), settings=SETTINGS)
    assert again is not None
    assert bits(again.state) == bits(state(3))
  assert pathlib.Path("2/metadata/metadata") in fell_back or how == "last byte lost"
  assert any("d" in name.parts[2:-1] for name in fell_back), fell_back


@damages
def test_the_only_checkpoint_is_refused(tmp_path: pathlib.Path, how: str) -> None:
  with Checkpoints(tmp_path / "whole") as checkpoints:
    checkpoints.save(7, state(7), settings=SETTINGS)
  refused = 0
  for copy, name in damaged_copies(tmp_path / "whole", tmp_path, how):
    with Checkpoints(copy) as checkpoints:
      try:
        found = checkpoints.restore(state(0), settings=SETTINGS)
        assert found is not None, name
        assert bits(found.state) == bits(state(7)), name
      except CheckpointError as error:
        assert f"every checkpoint in {copy} is damaged (step 7: " in str(error)
        refused += 1
  assert refused


@damages
def test_images_are_found_damaged_and_made_again(tmp_path: pathlib.Path, how: str) -> None:
  network = jobs.tiny_network()
  config = kwjax.SynthesisConfig.for_network("bns", 8).with_steps(3).replace(batch_size=3)

  def make(folder: pathlib.Path) -> kwjax.SampleSet:
    return kwjax.synthesize(network, config, num_images=6, key=jax.random.key(0), workdir=folder)

  expected = make(tmp_path / "whole")
  names = set()
  for copy, name in damaged_copies(tmp_path / "whole", tmp_path, how):
    names.add(name.name)
    try:
      found = make(copy)
    except CheckpointError as error:
      assert name.name == "manifest.json"
      assert str(copy / name) in str(error)
      assert f"remove {copy / 'images'}" in str(error)
      continue
    np.testing.assert_array_equal(found.images, expected.images)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.history["loss"], expected.history["loss"])
  assert names == {"manifest.json", "batch-00000.safetensors", "batch-00001.safetensors"}


def test_any_flipped_byte_of_a_manifest_is_found(tmp_path: pathlib.Path) -> None:
  images = np.random.default_rng(0).random((2, 4, 4, 3), dtype=np.float32)
  ImageStore(tmp_path, settings=SETTINGS).write(0, images, np.zeros(2, np.int32))
  path = tmp_path / "manifest.json"
  content = path.read_bytes()
  for place in range(len(content)):
    data = bytearray(content)
    data[place] ^= 1 << (place % 8)
    path.write_bytes(data)
    try:
      store = ImageStore(tmp_path, settings=SETTINGS)
      np.testing.assert_array_equal(store.images().images, images)
    except CheckpointError as error:
      assert str(path) in str(error)


@damages
def test_network_is_refused(tmp_path: pathlib.Path, how: str) -> None:
  network = jobs.tiny_network()
  save_network(network, tmp_path / "whole")
  refused = set()
  for copy, name in damaged_copies(tmp_path / "whole", tmp_path, how):
    try:
      assert fingerprint(load_network(copy)) == fingerprint(network), name
    except WeightsError as error:
      assert str(copy / name) in str(error)
      refused.add(name.name)
  # The last byte of the description is the end of a line.
  assert refused == {"model.safetensors"} if how == "last byte lost" else {"model.safetensors", DESCRIPTION_FILE}


def test_any_flipped_byte_of_a_description_is_found(tmp_path: pathlib.Path) -> None:
  save_network(jobs.tiny_network(), tmp_path)
  expected, path = read_description(tmp_path), tmp_path / DESCRIPTION_FILE
  content = path.read_bytes()
  for place in range(len(content)):
    data = bytearray(content)
    data[place] ^= 1 << (place % 8)
    path.write_bytes(data)
    try:
      assert read_description(tmp_path) == expected
    except WeightsError as error:
      assert str(path) in str(error)


@damages
def test_quantized_network_is_refused(tmp_path: pathlib.Path, how: str) -> None:
  network = jobs.tiny_network()
  rules = kwjax.QuantRules.parse("4w8a", weights="affine0")
  images = np.random.default_rng(0).random((4, 8, 8, 3), dtype=np.float32)
  ranges = kwjax.calibrate(network, images, rules, key=jax.random.key(0), steps=1, batch_size=16)
  quantized = kwjax.quantize(network, rules, ranges)
  save_quantized(quantized, tmp_path / "whole")
  expected, names, refused = quantized.apply(images), set(), set()
  integers = load_integer_weights(tmp_path / "whole")
  for copy, name in damaged_copies(tmp_path / "whole", tmp_path, how):
    names.add(name.name)
    try:
      np.testing.assert_array_equal(load_quantized(copy).apply(images), expected)
      found = load_integer_weights(copy)
      assert bits(list(found.values())) == bits(list(integers.values()))
    except kwjax.KwjaxError as error:
      assert str(copy / name) in str(error)
      refused.add(name.name)
  assert names == {"model.safetensors", "network.json", "quantization.json", "integer.safetensors"}
  assert refused >= {"model.safetensors", "integer.safetensors"}
  assert refused == names or how == "last byte lost"


@damages
def test_stage_is_done_again_and_settings_are_refused(
  tmp_path: pathlib.Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
  result = {"top1": 0.25, "layers": {"conv1": [1.0, 1e-7]}, "none": None}
  ResultStore(tmp_path / "whole", SETTINGS).once("score", lambda: result)
  for copy, name in damaged_copies(tmp_path / "whole", tmp_path, how):
    capsys.readouterr()
    if name.name == "settings.json" and how != "last byte lost":
      with pytest.raises(CheckpointError, match=rf"{copy / name} .*--no-resume starts over"):
        ResultStore(copy, SETTINGS)
      continue
    assert ResultStore(copy, SETTINGS).once("score", lambda: result) == result
    said = capsys.readouterr().err
    assert (f"{copy / name} is" in said and "computed again" in said) == (how != "last byte lost")
    assert read_sealed_json(copy / "stages" / "score.json") == {"result": result}


def test_a_sealed_file_tells_content_from_form(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "a.json"
  write_sealed_json(path, {"b": np.float32(0.1), "a": (1, 2), "c": {"x": None}})
  expected = {"b": float(np.float32(0.1)), "a": [1, 2], "c": {"x": None}}
  assert read_sealed_json(path) == expected
  path.write_text(" ".join(path.read_text().split()))
  assert read_sealed_json(path) == expected
  for text in (
    path.read_text().replace("[ 1, 2 ]", "[ 2, 1 ]"),
    path.read_text().replace("sha256", "sha257"),
    "[]",
    "{}",
  ):
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"a\.json is damaged or was edited"):
      read_sealed_json(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
  """A finished run, made in this process."""
  folder = tmp_path_factory.mktemp("damaged")
  jobs.save_inputs(folder)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("KWJAX_CACHE", str(folder / "cache"))
    assert cifar_bns.main(arguments(folder, "whole")) == 0
    yield folder


def arguments(folder: pathlib.Path, workdir: str) -> list[str]:
  return jobs.arguments(folder, folder / workdir, steps=3, distill_steps=6, checkpoint_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["halved", "byte flipped"])
@pytest.mark.parametrize(
  "kind",
  [
    "settings.json",
    "stages",
    "synthesis/images/batch",
    "synthesis/images/manifest",
    "gaussian",
    "distillation",
    "quantized",
  ],
)
def test_a_run_with_a_damaged_file_ends_the_same_or_refuses(
  finished: pathlib.Path, tmp_path: pathlib.Path, kind: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
  whole = finished / "whole"
  expected = jobs.result(whole)
  candidates = [name for name in files_of(whole) if str(name).startswith(kind)]
  # The largest file of the kind; of checkpoints the newest one's, since older ones are not read.
  newest = max((int(name.parts[2]) for name in candidates if kind == "distillation"), default=0)
  candidates = [name for name in candidates if not newest or name.parts[2] == str(newest)]
  chosen = max(candidates, key=lambda name: (whole / name).stat().st_size)
  copy = finished / f"{tmp_path.name}"
  shutil.copytree(whole, copy)
  path = copy / chosen
  path.write_bytes(DAMAGES[how](path.read_bytes()))
  capsys.readouterr()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    status = cifar_bns.main(arguments(finished, copy.name))
  errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
  if kind in ("settings.json", "synthesis/images/manifest"):
    assert status == 2
    assert len(errors) == 1
    assert str(path) in errors[0]
  else:
    assert status == 0
    jobs.assert_same_result(copy, expected)
