"""Prepared TensorFlow data sets, written by tensorflow-datasets itself, and what is said where there is none."""

from __future__ import annotations

import io
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from kwjax.errors import DataError
from kwjax.runtime.data import load_data

_GREY = np.random.default_rng(7).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)


def _png(pixels: np.ndarray) -> bytes:
  file = io.BytesIO()
  PIL.Image.fromarray(pixels[..., 0]).save(file, "png")
  return file.getvalue()


class TinyDigits(tfds.core.GeneratorBasedBuilder):
  """Five grey images; the test split has no labels, as in some published sets."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    features = {"image": tfds.features.Image(shape=(28, 28, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, manager: object) -> dict[str, Any]:
    return {"validation": self._generate_examples(range(5)), "test": self._generate_examples([-1])}

  def _generate_examples(self, labels: Any) -> Any:
    for i, label in enumerate(labels):
      yield f"{i:03d}", {"image": io.BytesIO(_png(_GREY[i])), "label": label}


@pytest.fixture
def prepared(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
  builder = TinyDigits(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  return tmp_path


def test_tfds_reads_a_prepared_set(prepared: pathlib.Path) -> None:
  data = load_data("tfds:tiny_digits", image_shape=(32, 32, 3), num_classes=10)
  images, labels = data.all()
  assert labels is not None
  # tfds shuffles while it writes: the label is the number of the image.
  assert sorted(labels.tolist()) == [0, 1, 2, 3, 4]
  np.testing.assert_array_equal(images[:, 2:30, 2:30] * 255, np.repeat(_GREY[labels], 3, axis=-1))
  part = load_data("tfds:tiny_digits:1.0.0:validation[:3]", limit=2)
  assert len(part) == 2
  assert part.labels is not None
  np.testing.assert_array_equal(part.labels, labels[:2])
  with pytest.raises(DataError, match="tfds:tiny_digits has no split nosuch"):
    load_data("tfds:tiny_digits:nosuch")
  assert load_data("tfds:tiny_digits:test").labels is None


def test_tfds_does_not_import_tensorflow(prepared: pathlib.Path) -> None:
  code = (
    "import sys\nfrom kwjax.runtime.data.images import load_data\n"
    "print(load_data('tfds:tiny_digits').all()[0].shape, 'tensorflow' in sys.modules)"
  )
  found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert found.stdout.strip() == "(5, 28, 28, 1) False", found.stderr[-2000:]


def test_tfds_by_folder(prepared: pathlib.Path) -> None:
  folder = prepared / "tiny_digits" / "1.0.0"
  by_name = load_data("tfds:tiny_digits").all()
  for spec in (f"tfds:{folder}", f"tfds:{folder}:validation", f"tfds:{os.path.relpath(folder)}"):
    for found, expected in zip(load_data(spec).all(), by_name, strict=True):
      np.testing.assert_array_equal(found, expected)
  for missing in (prepared / "tiny_digits", prepared / "nothing"):
    with pytest.raises(DataError, match=r"is no data set: the folder has no dataset_info\.json"):
      load_data(f"tfds:{missing}")
  with pytest.raises(DataError, match="images of 28x28 pixels are smaller than the wanted 64x64"):
    load_data(f"tfds:{folder}", image_shape=(64, 64, 3))
  (folder / "features.json").write_text("{")
  with pytest.raises(DataError, match="its description is damaged"):
    load_data(f"tfds:{folder}")


def test_a_damaged_record_is_named(prepared: pathlib.Path) -> None:
  folder = prepared / "tiny_digits" / "1.0.0"
  path = next(folder.glob("*validation*"))
  data = bytearray(path.read_bytes())
  start = data.find(b"\x89PNG")
  data[start + 100] ^= 1
  path.write_bytes(data)
  with pytest.raises(DataError, match=r"tfds:.*, images 0 to 4: cannot read the record: RuntimeError: .*hash mismatch"):
    load_data(f"tfds:{folder}:validation")
  path.unlink()
  with pytest.raises(DataError, match=r"tfds:.*tiny_digits"):
    load_data(f"tfds:{folder}:validation")


def test_tfds_says_how_to_prepare_a_missing_set(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  for spec, name in (("cifar10", "cifar10"), ("cifar10:3.0.2:test", "cifar10"), ("imagenet2012", "imagenet2012")):
    with pytest.raises(DataError, match=rf"not prepared.*python -m experiments\.prepare_data {name} --source FOLDER$"):
      load_data(f"tfds:{spec}")
  with pytest.raises(DataError, match=r"tfds\.builder\('beans', file_format='array_record'\)\.download_and_prepare"):
    load_data("tfds:beans")
  with pytest.raises(DataError, match="knows no data set no_such_set"):
    load_data("tfds:no_such_set")
