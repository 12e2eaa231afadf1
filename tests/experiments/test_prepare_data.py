"""Tiny archives in the publishers' own formats, through the command, and back through both readers."""

from __future__ import annotations

import gzip
import io
import os
import pathlib
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from experiments import prepare_data
from experiments._harness.archives import RECIPES
from experiments._harness.archives.imagenet import wnids as class_folders
from experiments._harness.archives.numpy_pickle import load_numpy_pickle
from kwjax import load_data
from kwjax.errors import DataError
from kwjax.runtime.data.tfds_sets import PREPARABLE

RANDOM = np.random.default_rng(0)


@pytest.fixture
def data_dir(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
  """The folder of prepared sets."""
  folder = tmp_path / "tfds"
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(folder))
  monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
  return folder


def run(name: str, source: pathlib.Path, *more: str) -> int:
  return prepare_data.main([name, "--source", str(source), "--no-verify", *more])


def pixels(count: int, size: int = 32, channels: int = 3) -> np.ndarray:
  return RANDOM.integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def tar_gz(path: pathlib.Path, files: dict[str, bytes], mode: str = "w:gz") -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
    for name, data in files.items():
      entry = tarfile.TarInfo(name)
      entry.size = len(data)
      archive.addfile(entry, io.BytesIO(data))
  return path


# --- pickles as Python 2's cPickle wrote them, opcode by opcode


def _text(text: bytes) -> bytes:
  return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<I", len(text)) + text


def _numbers(values: list[int]) -> bytes:
  return b"](" + b"".join(b"K" + bytes([v]) for v in values) + b"e"


def _array(rows: np.ndarray) -> bytes:
  shape = b"".join(b"M" + struct.pack("<H", n) for n in rows.shape) + b"\x86"
  head = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _text(b"b") + b"\x87R(K\x01" + shape
  dtype = (
    b"cnumpy\ndtype\n"
    + _text(b"u1")
    + b"K\x00K\x01\x87R(K\x03"
    + _text(b"|")
    + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
  )
  return head + dtype + b"\x89" + _text(rows.tobytes()) + b"tb"


def python2_pickle(content: dict[str, Any]) -> bytes:
  items = b""
  for key, value in content.items():
    if isinstance(value, np.ndarray):
      encoded = _array(value)
    elif isinstance(value, list) and isinstance(value[0], str):
      encoded = b"](" + b"".join(_text(v.encode()) for v in value) + b"e"
    else:
      encoded = _numbers(value) if isinstance(value, list) else _text(value.encode())
    items += _text(key.encode()) + encoded
  return b"\x80\x02}(" + items + b"u."


def planes(images: np.ndarray) -> np.ndarray:
  """u8[n,3072]: red plane, green plane, blue plane, each row by row."""
  return np.stack([[image[y, x, c] for c in range(3) for y in range(32) for x in range(32)] for image in images])


# --- reading back


def by_both_readers(name: str, split: str, data_dir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Images and labels as `load_data` gives them, after a check that plain tensorflow-datasets gives the same."""
  data = load_data(f"tfds:{name}:{split}")
  images, labels = data.all()
  plain = tfds.data_source(name, split=split, data_dir=data_dir)
  folder = data_dir / name / str(plain.dataset_info.version)
  for source in (plain, tfds.builder_from_directory(folder).as_data_source(split)):
    np.testing.assert_array_equal(np.stack([e["image"] for e in source]), np.rint(images * 255))
    assert labels is None or [e["label"] for e in source] == labels.tolist()
  assert labels is not None
  return np.rint(images * 255).astype(np.uint8), labels


def assert_same_set(found: tuple[np.ndarray, np.ndarray], images: np.ndarray, labels: np.ndarray) -> None:
  """The same labelled images in any order."""
  keys = [{(i.tobytes(), int(n)) for i, n in zip(*pair, strict=True)} for pair in (found, (images, labels))]
  assert len(found[0]) == len(images)
  assert keys[0] == keys[1]


# --- CIFAR


def cifar10(folder: pathlib.Path, form: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  names = [f"class{i}" for i in range(10)]
  files: dict[str, bytes] = {}
  content: dict[str, Any] = {"train": [], "test": []}
  for file in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
    images, labels = pixels(2), RANDOM.integers(0, 10, 2)
    content["test" if file == "test_batch" else "train"].append((images, labels))
    rows = planes(images)
    if form == "python":
      batch = {"batch_label": "a batch", "labels": labels.tolist(), "data": rows, "filenames": ["a.png", "b.png"]}
      files[f"cifar-10-batches-py/{file}"] = python2_pickle(batch)
    else:
      files[f"cifar-10-batches-bin/{file}.bin"] = np.c_[labels, rows].astype(np.uint8).tobytes()
  if form == "python":
    files["cifar-10-batches-py/batches.meta"] = python2_pickle({"label_names": names})
  else:
    files["cifar-10-batches-bin/batches.meta.txt"] = "\n".join([*names, "", ""]).encode()
  tar_gz(folder / f"cifar-10-{form}.tar.gz", files)
  return {split: tuple(np.concatenate(parts) for parts in zip(*batches)) for split, batches in content.items()}  # type: ignore[misc]


@pytest.mark.parametrize("form", ["python", "binary"])
def test_cifar10(tmp_path: pathlib.Path, data_dir: pathlib.Path, form: str) -> None:
  content = cifar10(tmp_path / "down", form)
  assert run("cifar10", tmp_path / "down") == 0
  for split, (images, labels) in content.items():
    assert_same_set(by_both_readers("cifar10", split, data_dir), images, labels)
  source = tfds.data_source("cifar10", split="train", data_dir=data_dir)
  assert source.dataset_info.features["label"].names[3] == "class3"
  numbers = [int(e["id"].removeprefix(b"train_")) for e in source]
  np.testing.assert_array_equal(np.stack([e["image"] for e in source]), content["train"][0][numbers])
  assert [p.name for p in (data_dir / "cifar10").iterdir()] == ["3.0.2"]


@pytest.mark.parametrize("form", ["python", "binary"])
def test_cifar100_unpacked(tmp_path: pathlib.Path, data_dir: pathlib.Path, form: str) -> None:
  folder = tmp_path / ("cifar-100-python" if form == "python" else "cifar-100-binary")
  folder.mkdir()
  content = {}
  for split in ("train", "test"):
    images, coarse, fine = pixels(3), np.array([19, 0, 7]), np.array([99, 0, 42])
    content[split] = (images, fine)
    if form == "python":
      batch = {
        "filenames": ["a"],
        "fine_labels": fine.tolist(),
        "coarse_labels": coarse.tolist(),
        "data": planes(images),
      }
      (folder / split).write_bytes(python2_pickle(batch))
    else:
      (folder / f"{split}.bin").write_bytes(np.c_[coarse, fine, planes(images)].astype(np.uint8).tobytes())
  names = {"coarse_label_names": [f"c{i}" for i in range(20)], "fine_label_names": [f"f{i}" for i in range(100)]}
  (folder / "meta").write_bytes(python2_pickle(names))
  for name, texts in names.items():
    (folder / f"{name}.txt").write_text("\n".join(texts) + "\n")
  assert run("cifar100", tmp_path) == 0
  for split, (images, fine) in content.items():
    assert_same_set(by_both_readers("cifar100", split, data_dir), images, fine)
  source = tfds.data_source("cifar100", split="test", data_dir=data_dir)
  assert {(int(e["coarse_label"]), int(e["label"])) for e in source} == {(19, 99), (0, 0), (7, 42)}
  assert source.dataset_info.features["coarse_label"].names[19] == "c19"


def test_a_pickle_that_asks_for_code_is_refused(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  folder = tmp_path / "cifar-10-batches-py"
  folder.mkdir()
  for name in ("batches.meta", "test_batch"):
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR.")
  assert run("cifar10", tmp_path, "--splits", "test", "--data-dir", str(tmp_path / "out")) == 2
  assert "refused, nothing was run: its pickle asks for 'os.system'" in capsys.readouterr().err
  assert not (tmp_path / "owned").exists()


def test_numpy_pickle_reads_what_python_3_writes_and_checks_lengths() -> None:
  import pickle

  array = pixels(2)[0]
  for protocol in (2, 3, 4):
    found = load_numpy_pickle(
      pickle.dumps({"a": [array, np.asfortranarray(array[..., 0])], "n": (1, "x")}, protocol), "it"
    )
    np.testing.assert_array_equal(found["a"][0], array)
    np.testing.assert_array_equal(found["a"][1], array[..., 0])
    assert found["n"] == (1, "x")
  short = python2_pickle({"data": array[0]}).replace(b"M\x20\x00M\x03\x00\x86", b"M\x20\x00M\x04\x00\x86")
  with pytest.raises(
    DataError, match=r"it: its pickle has an array of shape \(32, 4\) whose content is of another length"
  ):
    load_numpy_pickle(short, "it")
  with pytest.raises(DataError, match="another type than uint8"):
    load_numpy_pickle(pickle.dumps(array.astype(np.float32), 2), "it")
  with pytest.raises(DataError, match="without a content"):
    load_numpy_pickle(b"\x80\x02cnumpy\ndtype\nU\x02u1\x85R.", "it")


# --- MNIST and its kind


def idx(folder: pathlib.Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for kind, array in (("images-idx3", images[..., 0]), ("labels-idx1", labels)):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@pytest.fixture
def digits(tmp_path: pathlib.Path) -> tuple[pathlib.Path, np.ndarray, np.ndarray]:
  """A folder of idx files: 40 training images, 3 test images."""
  images, labels = pixels(40, 28, 1), RANDOM.integers(0, 10, 40)
  idx(tmp_path / "down", "train", images, labels)
  idx(tmp_path / "down", "t10k", images[:3], labels[:3])
  return tmp_path / "down", images, labels


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_idx_sets(digits: tuple[pathlib.Path, np.ndarray, np.ndarray], data_dir: pathlib.Path, name: str) -> None:
  folder, images, labels = digits
  assert run(name, folder) == 0
  assert_same_set(by_both_readers(name, "train", data_dir), images, labels)
  assert_same_set(by_both_readers(name, "test", data_dir), images[:3], labels[:3])
  rgb = load_data(f"tfds:{name}:test", image_shape=(32, 32, 3)).all()[0]
  assert rgb.shape == (3, 32, 32, 3)


class TheirDigits(tfds.core.GeneratorBasedBuilder):
  """The same examples and keys, written by tensorflow-datasets itself."""

  VERSION = tfds.core.Version("1.0.0")
  examples: tuple[np.ndarray, np.ndarray]

  def _info(self) -> Any:
    features = {
      "image": tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8),
      "label": tfds.features.ClassLabel(num_classes=10),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, (image, label) in enumerate(zip(*TheirDigits.examples, strict=True)):
      yield i, {"image": image, "label": label}


def test_the_order_is_that_of_tensorflow_datasets(
  digits: tuple[pathlib.Path, np.ndarray, np.ndarray], data_dir: pathlib.Path
) -> None:
  folder, images, labels = digits
  TheirDigits.examples = (images, labels)
  builder = TheirDigits(data_dir=data_dir / "theirs", file_format="array_record")
  builder.download_and_prepare()
  assert run("mnist", folder) == 0
  theirs = np.stack([e["image"] for e in builder.as_data_source("train")])
  np.testing.assert_array_equal(by_both_readers("mnist", "train", data_dir)[0], theirs)
  assert not np.array_equal(theirs, images)


# --- SVHN, STL-10


def test_svhn(tmp_path: pathlib.Path, data_dir: pathlib.Path) -> None:
  io = pytest.importorskip("scipy.io")
  images, digits = pixels(4), np.array([[10], [1], [9], [10]], np.uint8)
  for split in ("train", "test", "extra"):
    io.savemat(tmp_path / f"{split}_32x32.mat", {"X": np.moveaxis(images, 0, 3), "y": digits}, do_compression=True)
  assert run("svhn", tmp_path) == 0
  assert_same_set(by_both_readers("svhn_cropped", "test", data_dir), images, np.array([0, 1, 9, 0]))
  assert set(tfds.builder("svhn_cropped", data_dir=data_dir).info.splits) == {"train", "test"}
  assert run("svhn_cropped", tmp_path, "--splits", "extra", "test", "--overwrite") == 0
  assert len(load_data("tfds:svhn_cropped:extra")) == 4


@pytest.mark.parametrize("packed", [True, False])
def test_stl10(tmp_path: pathlib.Path, data_dir: pathlib.Path, packed: bool) -> None:
  images, labels = pixels(3, 96), np.array([0, 9, 4])
  # Column-major planes: channel, then column, then row.
  raw = np.stack([[i[y, x, c] for c in range(3) for x in range(96) for y in range(96)] for i in images]).tobytes()
  files = {"train_X.bin": raw, "test_X.bin": raw, "unlabeled_X.bin": raw, "class_names.txt": b"\n".join([b"n"] * 10)}
  files |= {name: (labels + 1).astype(np.uint8).tobytes() for name in ("train_y.bin", "test_y.bin")}
  files["class_names.txt"] = "".join(f"thing{i}\n" for i in range(10)).encode()
  inside = {f"stl10_binary/{name}": data for name, data in files.items()}
  if packed:
    tar_gz(tmp_path / "stl10_binary.tar.gz", inside)
  else:
    (tmp_path / "stl10_binary").mkdir()
    for name, data in inside.items():
      (tmp_path / name).write_bytes(data)
  assert run("stl10", tmp_path, "--splits", "train", "test", "unlabelled") == 0
  assert_same_set(by_both_readers("stl10", "test", data_dir), images, labels)
  assert load_data("tfds:stl10:unlabelled").labels is None
  small = load_data("tfds:stl10:test", image_shape=(32, 32, 3)).read([0])[0]
  whole = load_data("tfds:stl10:test").read([0])[0]
  # Three to one, antialiased, nothing cut off: the mean of the image stays.
  assert abs(small.mean() - whole.mean()) < 2e-3
  assert [p.name for p in (data_dir / "stl10").iterdir()] == ["1.0.0"]


# --- ImageNet


def jpeg(mode: str = "RGB", size: tuple[int, int] = (40, 30), form: str = "jpeg") -> bytes:
  file = io.BytesIO()
  array = RANDOM.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
  PIL.Image.fromarray(array).convert(mode).save(file, form)
  return file.getvalue()


def test_imagenet_tars(tmp_path: pathlib.Path, data_dir: pathlib.Path) -> None:
  wnids = class_folders()
  modes = {"n01440764_1.JPEG": "RGB", "n01440764_2.JPEG": "L", "n01440764_3.JPEG": "CMYK"}
  train = {
    wnids[0]: {name: jpeg(mode) for name, mode in modes.items()},
    wnids[999]: {f"{wnids[999]}_7.JPEG": jpeg(form="png")},
  }
  inner = {}
  for wnid, files in train.items():
    inner[f"{wnid}.tar"] = tar_gz(tmp_path / "inner.tar", files, "w").read_bytes()
  tar_gz(tmp_path / "ILSVRC2012_img_train.tar", inner, "w")
  validation = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg() for i in (3, 1, 50000)}
  tar_gz(tmp_path / "ILSVRC2012_img_val.tar", validation, "w")
  assert run("imagenet", tmp_path) == 0
  stored = tfds.data_source(
    "imagenet2012", split="train", data_dir=data_dir, decoders={"image": tfds.decode.SkipDecoding()}
  )
  found = {e["file_name"].decode(): (e["image"], int(e["label"])) for e in stored}
  assert {name: label for name, (_, label) in found.items()} == dict.fromkeys(modes, 0) | {f"{wnids[999]}_7.JPEG": 999}
  for name in ("n01440764_1.JPEG", "n01440764_2.JPEG"):
    assert found[name][0] == train[wnids[0]][name]
  with PIL.Image.open(io.BytesIO(found["n01440764_3.JPEG"][0])) as opened:
    assert (opened.format, opened.mode) == ("JPEG", "RGB")
  assert load_data("tfds:imagenet2012:train", image_shape=(24, 24, 3)).all()[0].shape == (4, 24, 24, 3)
  labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
  plain = tfds.data_source("imagenet2012", split="validation", data_dir=data_dir)
  by_name = {e["file_name"].decode(): wnids[int(e["label"])] for e in plain}
  assert by_name == {name: labels[int(name[15:23]) - 1] for name in validation}


def test_imagenet_folders(tmp_path: pathlib.Path, data_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  wnids = class_folders()
  for name in (f"val/{wnids[5]}/ILSVRC2012_val_00000009.JPEG", f"val/{wnids[7]}/x.JPEG"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(jpeg())
  assert run("imagenet2012", tmp_path) == 0
  labels = load_data("tfds:imagenet2012", num_classes=1000).labels
  assert labels is not None
  assert sorted(labels.tolist()) == [5, 7]
  # Photographs are shown as those in a folder are: with the margin of the usual evaluation.
  from_files = load_data(str(tmp_path / "val"), image_shape=(24, 24, 3)).all()[0]
  found = load_data("tfds:imagenet2012", image_shape=(24, 24, 3)).all()[0]
  np.testing.assert_array_equal(found[np.argsort(labels)], from_files)
  assert run("imagenet2012", tmp_path, "--splits", "train") == 2
  assert "is there without train: --overwrite makes it anew" in capsys.readouterr().err
  assert run("imagenet2012", tmp_path, "--splits", "train", "--overwrite") == 2
  assert "has no files of train: expected ILSVRC2012_img_train.tar" in capsys.readouterr().err
  assert len(load_data("tfds:imagenet2012")) == 2
  (tmp_path / "val" / "cats").mkdir()
  (tmp_path / "val" / "cats" / "a.JPEG").write_bytes(jpeg())
  assert run("imagenet2012", tmp_path, "--overwrite") == 2
  assert "cats is none of the 1000 ImageNet classes" in capsys.readouterr().err


# --- errors, interruptions


def test_what_is_missing_or_unknown_is_named(
  tmp_path: pathlib.Path, data_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  (tmp_path / "empty").mkdir()
  for arguments, message in (
    (["cifar10", "empty"], "has no cifar-10-python.tar.gz or cifar-10-binary.tar.gz or cifar-10-batches-py"),
    (["mnist", "empty"], "has no train-images-idx3-ubyte.gz or train-images-idx3-ubyte: download it"),
    (["svhn_cropped", "empty"], "has no train_32x32.mat: download it"),
    (["stl10", "empty"], "has no stl10_binary.tar.gz"),
    (["imagenet2012", "empty"], "has no files of train or validation: expected ILSVRC2012_img_train.tar"),
    (["mnist", "nowhere"], "is no folder; it must hold train-images-idx3-ubyte.gz"),
    (["cifar", "empty"], "no data set 'cifar', expected one of cifar10, cifar100"),
    (["mnist", "empty", "--splits", "validation"], "mnist has no split validation, only train, test"),
  ):
    assert run(arguments[0], tmp_path / arguments[1], *arguments[2:]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
  assert not list(data_dir.glob("*/[0-9]*"))


def test_files_that_are_not_the_published_ones_are_refused(
  digits: tuple[pathlib.Path, np.ndarray, np.ndarray],
  tmp_path: pathlib.Path,
  data_dir: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  folder = digits[0]
  assert prepare_data.main(["mnist", "--source", str(folder)]) == 2
  expected = "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
  message = capsys.readouterr().err
  assert "train-images-idx3-ubyte.gz is not the published file: its SHA256 is" in message
  assert f"expected {expected}" in message
  for path in folder.iterdir():
    # Unpacked files have no published checksum; their number of images has to do.
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
  assert prepare_data.main(["mnist", "--source", str(folder)]) == 2
  assert "mnist has 60,000 images in train, found 40" in capsys.readouterr().err
  cifar10(tmp_path / "cifar", "python")
  assert prepare_data.main(["cifar10", "--source", str(tmp_path / "cifar")]) == 2
  assert "its MD5 is" in capsys.readouterr().err
  assert not list(data_dir.glob("*/[0-9]*"))


@pytest.mark.parametrize("damage", ["cut", "flip", "junk"])
def test_damaged_archives_are_named(
  tmp_path: pathlib.Path, data_dir: pathlib.Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
  cifar10(tmp_path, "binary")
  path = tmp_path / "cifar-10-binary.tar.gz"
  data = bytearray(path.read_bytes())
  if damage == "flip":
    data[-6] ^= 1  # in the checksum: the content is whole, and only a reader who checks can tell
  path.write_bytes({"cut": data[: len(data) // 2], "flip": data, "junk": b"<html>not found</html>"}[damage])
  assert run("cifar10", tmp_path) == 2
  assert "cifar-10-binary.tar.gz is cut off or damaged" in capsys.readouterr().err
  assert not list(data_dir.glob("*/[0-9]*"))


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_cut_tar_of_imagenet_is_named(
  tmp_path: pathlib.Path, data_dir: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
  images = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg() for i in (1, 2)}
  path = tmp_path / f"ILSVRC2012_img_{name}.tar"
  if name == "train":
    images = {"n01440764.tar": tar_gz(tmp_path / "inner.tar", images, "w").read_bytes()}
  tar_gz(path, images, "w")
  whole = path.read_bytes()
  for left in (300, len(whole.rstrip(b"\0")) - 100):
    path.write_bytes(whole[:left])
    assert run("imagenet2012", tmp_path) == 2
    assert f"{path} is cut off or damaged" in capsys.readouterr().err
  assert not list(data_dir.glob("*/[0-9]*"))


def test_the_same_command_again_does_nothing(
  digits: tuple[pathlib.Path, np.ndarray, np.ndarray], data_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  folder = digits[0]
  assert run("mnist", folder) == 0
  stamps = {p: p.stat().st_mtime_ns for p in (data_dir / "mnist" / "3.0.1").iterdir()}
  assert run("mnist", folder) == 0
  assert "it is there already" in capsys.readouterr().err
  assert {p: p.stat().st_mtime_ns for p in (data_dir / "mnist" / "3.0.1").iterdir()} == stamps


def test_killed_in_the_middle_nothing_looks_finished(
  digits: tuple[pathlib.Path, np.ndarray, np.ndarray], data_dir: pathlib.Path
) -> None:
  code = (
    "import os, sys\nfrom experiments import prepare_data\nfrom experiments._harness.archives import recipe, idx\n"
    "png, left = recipe.png, [42]\n"
    "def deadly(pixels):\n  left[0] -= 1\n  return png(pixels) if left[0] else os._exit(9)\n"
    "idx.png = deadly\nprepare_data.main(sys.argv[1:])"
  )
  arguments = ["mnist", "--source", str(digits[0]), "--no-verify"]
  root = pathlib.Path(__file__).resolve().parents[2]
  command = [sys.executable, "-c", code, *arguments]
  environment = {**os.environ, "TFDS_DATA_DIR": str(data_dir), "JAX_PLATFORMS": "cpu"}
  assert subprocess.run(command, cwd=root, env=environment, capture_output=True, check=False).returncode == 9
  assert (data_dir / "mnist" / ".3.0.1.incomplete").exists()
  with pytest.raises(DataError, match=r"python -m experiments\.prepare_data mnist --source FOLDER"):
    load_data("tfds:mnist")
  assert prepare_data.main(arguments) == 0
  assert [p.name for p in (data_dir / "mnist").iterdir()] == ["3.0.1"]
  assert len(load_data("tfds:mnist:train")) == 40


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
  with pytest.raises(SystemExit) as stop:
    prepare_data.main(["--help"])
  assert stop.value.code == 0
  text = capsys.readouterr().out
  for words in ("cifar-10-python.tar.gz", "ILSVRC2012_img_val.tar", "TFDS_DATA_DIR", "--no-verify", "train* 50,000"):
    assert words in text


def test_readers_and_command_know_the_same_sets() -> None:
  assert set(PREPARABLE) == set(RECIPES)


def test_fashion_mnist_of_debian(data_dir: pathlib.Path) -> None:
  folder = pathlib.Path("/usr/share/datasets/fashion-mnist")
  if not folder.is_dir():
    pytest.skip("needs the Debian package dataset-fashion-mnist")
  assert run("fashion_mnist", folder, "--splits", "test") == 0
  prepared, original = load_data("tfds:fashion_mnist", limit=500), load_data(str(folder))
  assert original.labels is not None
  assert prepared.labels is not None
  rows = {image.tobytes(): label for image, label in zip(original.all()[0], original.labels, strict=True)}
  for image, label in zip(prepared.read(range(500)), prepared.labels, strict=True):
    assert rows[image.tobytes()] == label
