"""Synthesized images as a TensorFlow data set: bit-identical or with the stated rounding, whole or not at all."""

from __future__ import annotations

import os
import pathlib
import stat
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

import kwjax
from kwjax.errors import DataError, KwjaxError
from kwjax.runtime.data.tfds_writer import DataSetInfo, SplitExamples, write_tfds


def samples(count: int = 6, channels: int = 3, seed: int = 0) -> kwjax.SampleSet:
  random = np.random.default_rng(seed)
  images = random.random((count, 8, 10, channels), np.float32)
  images[0] = np.float32(1e-30)
  images[1, 0, 0] = 1.0
  return kwjax.SampleSet(images, np.arange(count, dtype=np.int32) % 4, {"loss": np.zeros((1, 2), np.float32)})


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_floats_come_back_bit_by_bit(tmp_path: pathlib.Path, channels: int) -> None:
  made = samples(channels=channels)
  folder = kwjax.save_tfds(made, tmp_path / "set")
  data = kwjax.load_data(f"tfds:{folder}", num_classes=4)
  images, labels = data.all()
  np.testing.assert_array_equal(images.view(np.uint32), made.images.view(np.uint32))
  np.testing.assert_array_equal(labels, made.labels)
  source = tfds.builder_from_directory(folder).as_data_source("train")
  np.testing.assert_array_equal(np.stack([e["image"] for e in source]), made.images)
  assert source.dataset_info.features["label"].num_classes == 4
  assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_rounds_as_stated(tmp_path: pathlib.Path, channels: int) -> None:
  made = samples(channels=channels)
  made.images[2, 0, 0], made.images[2, 0, 1] = 2.0, -3.0
  folder = kwjax.save_tfds(made, tmp_path / "set", encoding="png", num_classes=10)
  source = tfds.builder_from_directory(folder).as_data_source("train")
  stored = np.stack([e["image"] for e in source])
  assert stored.dtype == np.uint8
  np.testing.assert_array_equal(stored[2, 0, :2].reshape(-1), [255] * channels + [0] * channels)
  inside = (made.images >= 0) & (made.images <= 1)
  assert np.abs(stored / 255 - made.images)[inside].max() <= 1 / 510 + 1e-7
  assert source.dataset_info.features["label"].num_classes == 10


def test_it_is_a_named_set_in_its_place(tmp_path: pathlib.Path) -> None:
  kwjax.save_tfds(samples(), tmp_path / "mine" / "1.0.0", name="mine", split="bns")
  assert len(tfds.data_source("mine", split="bns", data_dir=tmp_path)) == 6


def test_unclipped_images_are_kept_and_refused_where_the_range_is_promised(tmp_path: pathlib.Path) -> None:
  made = samples()
  made.images[4] = 3.5
  made = made._replace(labels=np.full(6, -1, np.int32))
  folder = kwjax.save_tfds(made, tmp_path / "set")
  source = tfds.builder_from_directory(folder).as_data_source("train")
  np.testing.assert_array_equal(source[4]["image"], made.images[4])
  data = kwjax.load_data(f"tfds:{folder}")
  assert data.labels is None
  with pytest.raises(DataError, match=r"image 4: float pixels must be in \[0, 1\], found 3\.5\.\.3\.5"):
    data.read([4])


@pytest.mark.parametrize(
  ("change", "options", "message"),
  [
    ({"images": np.zeros((2, 4, 4, 3))}, {}, r"expected images float32\[n,h,w,c\], found float64"),
    ({"images": np.zeros((0, 4, 4, 3), np.float32)}, {}, "expected images float32"),
    ({"labels": np.zeros(5, np.int32)}, {}, "expected 6 labels"),
    ({"labels": np.full(6, -2, np.int32)}, {}, "at least -1"),
    ({"images": np.full((6, 4, 4, 3), np.nan, np.float32)}, {}, "NaN"),
    ({"images": np.zeros((6, 4, 4, 5), np.float32)}, {"encoding": "png"}, "PNG holds 1, 3 or 4 channels, found 5"),
    ({}, {"encoding": "jpeg"}, "expected encoding"),
    ({}, {"num_classes": 3}, "labels must be below num_classes=3, found 3"),
    ({}, {"name": "My Set"}, "name must be of lower case letters"),
    ({}, {"split": "a+b"}, "split's name must be"),
  ],
)
def test_bad_arguments_are_refused(
  tmp_path: pathlib.Path, change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
  with pytest.raises(DataError, match=message):
    kwjax.save_tfds(samples()._replace(**change), tmp_path / "set", **options)
  assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_only_on_request_and_only_a_data_set(tmp_path: pathlib.Path) -> None:
  kwjax.save_tfds(samples(), tmp_path / "set")
  with pytest.raises(DataError, match="already holds a data set"):
    kwjax.save_tfds(samples(3), tmp_path / "set")
  assert len(kwjax.load_data(f"tfds:{tmp_path}/set")) == 6
  kwjax.save_tfds(samples(3), tmp_path / "set", overwrite=True)
  assert len(kwjax.load_data(f"tfds:{tmp_path}/set")) == 3
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.tex").write_text("text")
  with pytest.raises(DataError, match="is not empty and holds no data set"):
    kwjax.save_tfds(samples(), tmp_path / "mine", overwrite=True)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "set"]


# --- the writer


def write(folder: pathlib.Path, count: int, examples: Any, **options: Any) -> pathlib.Path:
  features = tfds.features.FeaturesDict({"number": tfds.features.Scalar(np.int64)})
  return write_tfds(folder, DataSetInfo("numbers", features), {"train": SplitExamples(count, examples)}, **options)


def test_many_files_keep_the_order(tmp_path: pathlib.Path) -> None:
  seen: list[str] = []
  folder = write(tmp_path / "set", 25, [{"number": i} for i in range(25)], shard_bytes=60, on_example=seen.append)
  files = sorted(p.name for p in folder.glob("numbers-train*"))
  assert len(files) > 4
  assert files[0] == f"numbers-train.array_record-00000-of-{len(files):05d}"
  source = tfds.builder_from_directory(folder).as_data_source("train")
  assert [int(e["number"]) for e in source] == list(range(25))
  assert seen == ["train"] * 25


@pytest.mark.parametrize(("count", "given"), [(3, 2), (2, 3), (0, 0)])
def test_another_number_of_examples_than_announced(tmp_path: pathlib.Path, count: int, given: int) -> None:
  with pytest.raises(DataError, match=f"split train: expected {count} examples, found {given}"):
    write(tmp_path / "set", count, [{"number": i} for i in range(given)])
  assert not list(tmp_path.iterdir())


def test_an_error_in_the_middle_leaves_what_was_there(tmp_path: pathlib.Path) -> None:
  write(tmp_path / "set", 2, [{"number": 1}, {"number": 2}])
  before = {p.name: p.read_bytes() for p in (tmp_path / "set").iterdir()}

  def failing() -> Any:
    yield {"number": 3}
    raise ValueError("no more")

  with pytest.raises(ValueError, match="no more"):
    write(tmp_path / "set", 2, failing(), overwrite=True)
  assert {p.name: p.read_bytes() for p in (tmp_path / "set").iterdir()} == before
  assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_second_writer_is_refused(tmp_path: pathlib.Path) -> None:
  def examples() -> Any:
    with pytest.raises(KwjaxError, match="is in use by process"):
      write(tmp_path / "set", 1, [{"number": 2}])
    yield {"number": 1}

  folder = write(tmp_path / "set", 1, examples())
  assert int(tfds.builder_from_directory(folder).as_data_source("train")[0]["number"]) == 1


def test_a_full_disk_is_one_sentence(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  if not pathlib.Path("/dev/full").exists() or not stat.S_ISCHR(os.stat("/dev/full").st_mode):
    pytest.skip("needs /dev/full")
  monkeypatch.setattr(
    "kwjax.runtime.data.tfds_writer._shard_path", lambda folder, split, index: pathlib.Path("/dev/full")
  )
  with pytest.raises(KwjaxError, match="cannot write the data set, nothing was left there: .*No space left on device"):
    write(tmp_path / "set", 1, [{"number": 1}])
  assert not list(tmp_path.iterdir())
