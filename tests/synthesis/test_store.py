"""The store of synthesised images: round trip, damage, settings, the same bytes for the same images."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from kwjax.errors import CheckpointError, KwjaxError
from kwjax.runtime import files
from kwjax.synthesis.store import ImageStore

SETTINGS = {"scheme": "bns", "seed": 0, "augment": {"flip": True}}


def _batch(seed: int, count: int = 4) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
  rng = np.random.default_rng(seed)
  images = rng.random((count, 5, 6, 3), dtype=np.float32)
  return images, rng.integers(0, 10, count, dtype=np.int32), {"jkl": rng.random(7), "steps": np.int32(seed)}


def _filled(folder: pathlib.Path) -> ImageStore:
  store = ImageStore(folder, settings=SETTINGS)
  for index, count in ((1, 4), (0, 4), (2, 3)):
    store.write(index, *_batch(index, count))
  return store


def test_what_was_written_comes_back_in_batch_order(tmp_path: pathlib.Path) -> None:
  _filled(tmp_path)
  store = ImageStore(tmp_path, settings=SETTINGS)
  assert store.indices() == [0, 1, 2]
  assert [store.has(index) for index in range(4)] == [True, True, True, False]
  assert store.damaged() == []
  expected = [_batch(0), _batch(1), _batch(2, 3)]
  for index, (images, labels, history) in enumerate(expected):
    shard = store.read(index)
    np.testing.assert_array_equal(shard.images, images)
    np.testing.assert_array_equal(shard.labels, labels)
    assert shard.images.dtype == np.float32
    assert shard.labels.dtype == np.int32
    np.testing.assert_array_equal(shard.history["jkl"], history["jkl"])
    assert shard.history["steps"].shape == ()
  whole = store.images()
  np.testing.assert_array_equal(whole.images, np.concatenate([images for images, _, _ in expected]))
  np.testing.assert_array_equal(whole.labels, np.concatenate([labels for _, labels, _ in expected]))
  assert [int(history["steps"]) for history in whole.histories] == [0, 1, 2]


def test_the_same_images_give_the_same_bytes_in_whatever_memory_order(tmp_path: pathlib.Path) -> None:
  images, labels, history = _batch(0)
  for name, array in (("a", images), ("b", np.asfortranarray(images))):
    ImageStore(tmp_path / name, settings=SETTINGS).write(0, array, labels, dict(reversed(history.items())))
  found = [(tmp_path / name / "batch-00000.safetensors").read_bytes() for name in "ab"]
  assert found[0] == found[1]
  assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()
  np.testing.assert_array_equal(ImageStore(tmp_path / "b", settings=SETTINGS).read(0).images, images)


def test_parts_of_several_processes_are_one_batch(tmp_path: pathlib.Path) -> None:
  store = ImageStore(tmp_path, settings=SETTINGS)
  images, labels, history = _batch(0, 3)
  # The last process had nothing but filling.
  cuts = [(0, 2), (2, 3), (3, 3)]
  written = [
    store.write_part(0, images[a:b], labels[a:b], history if part == 0 else {}, part=part, parts=3)
    for part, (a, b) in enumerate(cuts)
  ]
  assert not store.has(0)
  store.record(0, written)
  store.write(1, *_batch(1))
  again = ImageStore(tmp_path, settings=SETTINGS)
  assert again.has(0)
  shard, whole = again.read(0), again.images()
  np.testing.assert_array_equal(shard.images, images)
  np.testing.assert_array_equal(shard.labels, labels)
  np.testing.assert_array_equal(shard.history["jkl"], history["jkl"])
  assert whole.images.shape == (7, 5, 6, 3)
  assert [set(h) for h in whole.histories] == [{"jkl", "steps"}] * 2
  (tmp_path / "batch-00000.part-1-of-3.safetensors").unlink()
  assert again.damaged() == [0]
  with pytest.raises(CheckpointError, match=r"batch 0 of .*batch-00000\.part-1-of-3\.safetensors"):
    again.read(0)
  again.write(0, images, labels, history)
  assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
    "batch-00000.safetensors",
    "batch-00001.safetensors",
  ]


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_a_damaged_batch_is_named_and_can_be_made_again(tmp_path: pathlib.Path, how: str) -> None:
  store = _filled(tmp_path)
  path = tmp_path / "batch-00001.safetensors"
  data = path.read_bytes()
  if how == "flip":
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
  elif how == "truncate":
    path.write_bytes(data[:100])
  else:
    path.unlink()
  assert store.damaged() == [1]
  assert not store.has(1)
  assert store.has(0)
  for read in (lambda: store.read(1), store.images):
    with pytest.raises(CheckpointError, match=r"batch 1 of .*batch-00001\.safetensors"):
      read()
  store.write(1, *_batch(1))
  assert store.damaged() == []
  assert path.read_bytes() == data


def test_a_kill_between_file_and_manifest_leaves_the_batch_absent(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  store = _filled(tmp_path)
  (tmp_path / ".batch-00003.safetensors.1-1.tmp").write_bytes(b"left by a killed run")

  def killed(*arguments: object) -> None:
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr("kwjax.synthesis.store.write_sealed_json", killed)
    with pytest.raises(KeyboardInterrupt):
      store.write(3, *_batch(3))
  again = ImageStore(tmp_path, settings=SETTINGS)
  assert (tmp_path / "batch-00003.safetensors").exists()
  assert not again.has(3)
  assert again.damaged() == []
  again.write(3, *_batch(3))
  assert again.has(3)
  assert not list(tmp_path.glob(".*.tmp"))


def test_a_full_disk_leaves_the_batches_before(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  store = _filled(tmp_path)

  def full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(files.os, "fsync", full)
    with pytest.raises(KwjaxError, match=r"batch-00003\.safetensors .*No space left"):
      store.write(3, *_batch(3))
  assert store.indices() == [0, 1, 2]
  assert store.damaged() == []


def test_other_settings_are_refused_by_name(tmp_path: pathlib.Path) -> None:
  _filled(tmp_path)
  with pytest.raises(CheckpointError, match=r"augment\.flip is true there and false now; seed is 0 there and 1 now"):
    ImageStore(tmp_path, settings={"scheme": "bns", "seed": 1, "augment": {"flip": False}})


def test_a_gap_and_an_empty_store_are_refused(tmp_path: pathlib.Path) -> None:
  store = ImageStore(tmp_path, settings=SETTINGS)
  assert not tmp_path.joinpath("manifest.json").exists()
  with pytest.raises(CheckpointError, match="holds no images"):
    store.images()
  store.write(2, *_batch(2))
  with pytest.raises(CheckpointError, match=r"lacks the batches \[0, 1\]"):
    store.images()
  with pytest.raises(CheckpointError, match=r"has no batch 0; it has \[2\]"):
    store.read(0)


def test_a_damaged_manifest_is_named(tmp_path: pathlib.Path) -> None:
  _filled(tmp_path)
  path = tmp_path / "manifest.json"
  manifest = json.loads(path.read_text())
  del manifest["sha256"]
  files.write_sealed_json(path, {**manifest, "version": 99})
  with pytest.raises(CheckpointError, match=r"manifest\.json is not a manifest of images of version 2"):
    ImageStore(tmp_path, settings=SETTINGS)
  path.write_text(json.dumps({**manifest, "sha256": "0" * 64}))
  with pytest.raises(CheckpointError, match=r"manifest\.json is damaged .* remove .* to make its images again"):
    ImageStore(tmp_path, settings=SETTINGS)
  path.write_text(path.read_text()[:50])
  with pytest.raises(CheckpointError, match=r"manifest\.json is not valid JSON"):
    ImageStore(tmp_path, settings=SETTINGS)


def test_wrong_arrays_are_refused(tmp_path: pathlib.Path) -> None:
  store = _filled(tmp_path)
  images, labels, _ = _batch(5)
  with pytest.raises(CheckpointError, match=r"batch 5: expected images float32\[n,h,w,c\], got float64\[4, 5, 6, 3\]"):
    store.write(5, images.astype(np.float64), labels)
  with pytest.raises(CheckpointError, match=r"expected images of shape \[5, 6, 3\] as before, got \[4, 6, 3\]"):
    store.write(5, images[:, 1:], labels)
  with pytest.raises(CheckpointError, match=r"expected labels int32\[4\], got int64\[4\]"):
    store.write(5, images, labels.astype(np.int64))
  with pytest.raises(CheckpointError, match="batch 5: images hold NaN"):
    store.write(5, np.where(images > 0.5, np.nan, images).astype(np.float32), labels)
  with pytest.raises(CheckpointError, match="at least 0, got -1"):
    store.write(-1, images, labels)
  assert store.indices() == [0, 1, 2]
