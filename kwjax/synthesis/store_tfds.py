"""Synthetic images as a tensorflow-datasets data set."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from kwjax.errors import DataError
from kwjax.runtime.files import PathLike
from kwjax.synthesis.synthesize import SampleSet

Encoding = Literal["float32", "png"]


def save_tfds(
  samples: SampleSet,
  folder: PathLike,
  *,
  encoding: Encoding = "float32",
  name: str = "synthetic",
  split: str = "train",
  num_classes: int | None = None,
  overwrite: bool = False,
) -> pathlib.Path:
  """Write synthetic images as a TFDS data set in array_record form; TensorFlow is not needed.

  Read it with `tfds.builder_from_directory(folder).as_data_source(split)` or `kwjax.load_data("tfds:FOLDER")`. Written to
  `DATA_DIR/NAME/1.0.0`, it is also `tfds.data_source(NAME)`. Examples keep the order of the samples and have the features
  `image` and `label` (-1: no target class). The curves are not stored.

  Args:
    samples: images f32[n,h,w,c], labels i32[n].
    folder: the new folder; it appears whole or not at all.
    encoding: "float32" stores every pixel bit for bit, also unclipped Gaussian images (`load_data` reads only images in
      [0,1]). "png" stores q = round(255 min(max(x, 0), 1)), ties to even, as PNG with 1, 3 or 4 channels. It is
      smaller, any viewer opens it, and |x - q/255| <= 1/510 for x in [0,1].
    name: lower case letters, digits and underscores.
    split: name of the only split.
    num_classes: number of classes; default: the largest label plus one.
    overwrite: replace an existing data set.

  Returns:
    The folder.

  Raises:
    DataError: there are no images, images or labels have another form, hold NaN or do not fit the encoding, or the
      folder exists.
    KwjaxError: the folder cannot be written.
  """
  # Imported here: it takes two tenths of a second.
  from kwjax.runtime.data.tfds import tfds
  from kwjax.runtime.data.tfds_writer import DataSetInfo, SplitExamples, write_tfds

  images, labels = _checked(samples, encoding)
  top = int(labels.max()) + 1
  if num_classes is not None and top > num_classes:
    raise DataError(f"save_tfds: labels must be below num_classes={num_classes}, found {top - 1}")
  if encoding == "float32":
    form: Any = tfds.features.Tensor(shape=images.shape[1:], dtype=np.float32, encoding=tfds.features.Encoding.BYTES)
  else:
    form = tfds.features.Image(shape=images.shape[1:], dtype=np.uint8, encoding_format="png")
  classes = tfds.features.ClassLabel(num_classes=num_classes or max(top, 1))
  info = DataSetInfo(
    name=name,
    features=tfds.features.FeaturesDict({"image": form, "label": classes}),
    description=f"Images synthesized from a trained network with kwjax, stored as {encoding}; pixels in "
    f"{'[0, 1]' if encoding == 'float32' else '0..255'}.",
  )
  return write_tfds(
    folder, info, {split: SplitExamples(len(images), _examples(images, labels, encoding))}, overwrite=overwrite
  )


def _checked(samples: SampleSet, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
  images, labels = np.asarray(samples.images), np.asarray(samples.labels)
  if images.ndim != 4 or images.dtype != np.float32 or not len(images):
    raise DataError(f"save_tfds: expected images float32[n,h,w,c], found {images.dtype}{list(images.shape)}")
  if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < -1:
    raise DataError(
      f"save_tfds: expected {len(images)} labels of at least -1, found {labels.dtype}{list(labels.shape)}"
    )
  if not np.isfinite(images).all():
    raise DataError("save_tfds: images hold NaN or infinite pixels")
  if encoding not in ("float32", "png"):
    raise DataError(f'save_tfds: expected encoding "float32" or "png", found {encoding!r}')
  if encoding == "png" and images.shape[3] not in (1, 3, 4):
    raise DataError(f"save_tfds: PNG holds 1, 3 or 4 channels, found {images.shape[3]}: use encoding float32")
  return images, labels


def _examples(images: np.ndarray, labels: np.ndarray, encoding: Encoding) -> Iterator[dict[str, Any]]:
  for image, label in zip(images, labels, strict=True):
    yield {"image": image if encoding == "float32" else _png(image), "label": int(label)}


def _png(image: np.ndarray) -> bytes:
  import PIL.Image

  pixels = np.rint(np.clip(image, 0, 1) * np.float32(255)).astype(np.uint8)
  file = io.BytesIO()
  PIL.Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "png")
  return file.getvalue()
