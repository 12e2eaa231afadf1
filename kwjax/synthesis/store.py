"""Synthetic images on disk: one file with a checksum for each batch, so that a stopped run can be resumed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from kwjax.errors import CheckpointError
from kwjax.runtime.files import (
  PathLike,
  atomic_write,
  canonical_json,
  check_settings,
  read_sealed_json,
  sha256_file,
  write_sealed_json,
)

_MANIFEST = "manifest.json"
_VERSION = 2


class Shard(NamedTuple):
  """One batch: images f32[n,h,w,c] in [0,1], labels i32[n], and the curves of its synthesis."""

  images: np.ndarray
  labels: np.ndarray
  history: dict[str, np.ndarray]


class StoredImages(NamedTuple):
  """A whole set: images f32[n,h,w,c], labels i32[n], and one history for each batch, in batch order."""

  images: np.ndarray
  labels: np.ndarray
  histories: tuple[dict[str, np.ndarray], ...]


class ImageStore:
  """Batches of images in a folder: `batch-00000.safetensors`, ... (`.part-0-of-2` with several processes), `manifest.json`.

  Invariant: a batch is present only if its file has the SHA-256 in the manifest. The manifest is written after the file. A
  kill between the two leaves the batch absent, and it is made again. The same arrays give the same bytes. Only one run
  writes a folder at a time (`kwjax.runtime.workdir.lock_workdir`). With several processes, each writes its part of a
  batch into its own file (`write_part`), and one process records all parts. A reader sees whole batches.
  """

  def __init__(self, folder: PathLike, *, settings: Mapping[str, Any]) -> None:
    """Open the folder, which need not exist.

    Args:
      folder: of the batches.
      settings: everything that the images depend on (network, scheme, seed, steps, batch size), for `canonical_json`.

    Raises:
      CheckpointError: the folder holds images made with other settings (each is named), or its manifest is damaged.
    """
    self.folder = pathlib.Path(folder)
    self._settings = json.loads(canonical_json(settings))
    if (self.folder / _MANIFEST).exists():
      check_settings(self.folder, self._manifest()["settings"], self._settings)

  def indices(self) -> list[int]:
    """Numbers of the recorded batches, ascending, whether or not their files are still intact."""
    return sorted(int(index) for index in self._manifest()["shards"])

  def has(self, index: int) -> bool:
    """Whether batch `index` is recorded and its file has the recorded SHA-256; reads the whole file."""
    entry = self._manifest()["shards"].get(str(index))
    return entry is not None and self._intact(entry)

  def damaged(self) -> list[int]:
    """Numbers of the recorded batches whose file is missing or damaged. Write them again to repair the store."""
    shards = self._manifest()["shards"]
    return [index for index in self.indices() if not self._intact(shards[str(index)])]

  def write(self, index: int, images: np.ndarray, labels: np.ndarray, history: Mapping[str, Any] | None = None) -> None:
    """Store one batch, replacing an earlier one of the same number.

    Args:
      index: batch number, from 0.
      images: f32[n,h,w,c], finite; h, w, c as in the batches before.
      labels: i32[n].
      history: curves or numbers, each any NumPy array.

    Raises:
      CheckpointError: an argument does not have that form.
      KwjaxError: the disk is full; the batches before are unchanged.
    """
    self.record(index, [self.write_part(index, images, labels, history)])

  def write_part(
    self,
    index: int,
    images: np.ndarray,
    labels: np.ndarray,
    history: Mapping[str, Any] | None = None,
    *,
    part: int = 0,
    parts: int = 1,
  ) -> dict[str, Any]:
    """Store a part of a batch without recording it. Arguments and errors as in `write`; a part can be empty.

    Args:
      index: batch number.
      images: f32[n,h,w,c], this part's.
      labels: i32[n].
      history: of the whole batch; one part should have it.
      part: index of this part, from 0, in the order of the images.
      parts: number of parts.

    Returns:
      A JSON-able value for `record`.
    """
    tensors = _checked(index, images, labels, history or {}, self._manifest()["shape"])
    data = safetensors.numpy.save(tensors)
    name = f"batch-{index:05d}.safetensors" if parts == 1 else f"batch-{index:05d}.part-{part}-of-{parts}.safetensors"
    for leftover in self.folder.glob(f".{name}.*.tmp"):
      # A batch can have hundreds of megabytes, so files of killed runs must not accumulate.
      with contextlib.suppress(FileNotFoundError):
        leftover.unlink()
    atomic_write(self.folder / name, data)
    digest = hashlib.sha256(data).hexdigest()
    return {"file": name, "sha256": digest, "bytes": len(data), "count": len(images), "shape": list(images.shape[1:])}

  def record(self, index: int, written: Sequence[Mapping[str, Any]]) -> None:
    """Record a batch as present: the values of `write_part` for all its parts, in order.

    Raises:
      KwjaxError: the disk is full; the batches before are unchanged.
    """
    manifest = self._manifest()
    manifest["shape"] = written[0]["shape"]
    parts = [{name: value for name, value in entry.items() if name != "shape"} for entry in written]
    whole = {"parts": parts, "count": sum(part["count"] for part in parts)}
    earlier = manifest["shards"].get(str(index))
    manifest["shards"][str(index)] = parts[0] if len(parts) == 1 else whole
    manifest["shards"] = dict(sorted(manifest["shards"].items(), key=lambda item: int(item[0])))
    write_sealed_json(self.folder / _MANIFEST, manifest)
    # A run with another number of processes wrote the batch before, and it was damaged.
    for stale in {part["file"] for part in _parts(earlier or {})} - {part["file"] for part in parts}:
      (self.folder / stale).unlink(missing_ok=True)

  def read(self, index: int) -> Shard:
    """Read one batch and check its bytes.

    Raises:
      CheckpointError: the batch is not recorded, or its file is missing or damaged (named); write it again.
    """
    entry = self._manifest()["shards"].get(str(index))
    if entry is None:
      raise CheckpointError(f"{self.folder} has no batch {index}; it has {self.indices()}")
    parts = [self._read_part(index, part) for part in _parts(entry)]
    history = {name: value for part in parts for name, value in part.history.items()}
    if len(parts) == 1:
      return parts[0]
    images, labels = (np.concatenate(arrays) for arrays in zip(*((p.images, p.labels) for p in parts), strict=True))
    return Shard(images, labels, history)

  def images(self) -> StoredImages:
    """Read all batches as one set, each checked as in `read`; at most one batch is in memory twice.

    Raises:
      CheckpointError: there are no batches, a number between 0 and the last is absent, or a batch is damaged.
    """
    manifest, indices = self._manifest(), self.indices()
    if not indices:
      raise CheckpointError(f"{self.folder} holds no images")
    absent = sorted(set(range(indices[-1] + 1)) - set(indices))
    if absent:
      raise CheckpointError(f"{self.folder} lacks the batches {absent}; it has {indices}")
    count = sum(entry["count"] for entry in manifest["shards"].values())
    images, labels = np.empty((count, *manifest["shape"]), np.float32), np.empty(count, np.int32)
    histories, start = [], 0
    for index in indices:
      shard = self.read(index)
      stop = start + len(shard.images)
      images[start:stop], labels[start:stop] = shard.images, shard.labels
      histories.append(shard.history)
      start = stop
    return StoredImages(images, labels, tuple(histories))

  def _read_part(self, index: int, entry: Mapping[str, Any]) -> Shard:
    path = self.folder / entry["file"]
    try:
      data = path.read_bytes()
    except OSError as error:
      raise CheckpointError(f"batch {index} of {self.folder}: cannot read {path.name}: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
      raise CheckpointError(
        f"batch {index} of {self.folder} is damaged: {path.name} ({len(data):,} bytes) does not have the SHA-256 "
        f"it was saved with ({entry['bytes']:,} bytes); make it again"
      )
    tensors = safetensors.numpy.load(data)
    history = {name.removeprefix("history."): value for name, value in tensors.items() if name.startswith("history.")}
    return Shard(tensors["images"], tensors["labels"], history)

  def _manifest(self) -> dict[str, Any]:
    path = self.folder / _MANIFEST
    if not path.exists():
      return {"version": _VERSION, "settings": self._settings, "shape": None, "shards": {}}
    try:
      manifest = read_sealed_json(path)
    except CheckpointError as error:
      raise CheckpointError(f"{error}; remove {self.folder} to make its images again") from error
    if manifest.get("version") != _VERSION or "shards" not in manifest:
      raise CheckpointError(f"{path} is not a manifest of images of version {_VERSION}")
    return manifest

  def _intact(self, entry: Mapping[str, Any]) -> bool:
    paths = [(self.folder / part["file"], part) for part in _parts(entry)]
    # The size reveals most truncations without reading the file.
    return all(
      path.is_file() and path.stat().st_size == part["bytes"] and sha256_file(path) == part["sha256"]
      for path, part in paths
    )


def _parts(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """The files of a batch: one, or those of several processes."""
  return list(entry["parts"]) if "parts" in entry else [entry] if entry else []


def _checked(
  index: int, images: np.ndarray, labels: np.ndarray, history: Mapping[str, Any], shape: list[int] | None
) -> dict[str, np.ndarray]:
  """The arrays of one batch by name, in C order (safetensors writes the raw buffer of any other order)."""
  where = f"batch {index}"
  images, labels = np.asarray(images), np.asarray(labels)
  if index < 0:
    raise CheckpointError(f"a batch number must be at least 0, got {index}")
  if images.ndim != 4 or images.dtype != np.float32:
    raise CheckpointError(f"{where}: expected images float32[n,h,w,c], got {images.dtype}{list(images.shape)}")
  if shape is not None and list(images.shape[1:]) != shape:
    raise CheckpointError(f"{where}: expected images of shape {shape} as before, got {list(images.shape[1:])}")
  if labels.shape != images.shape[:1] or labels.dtype != np.int32:
    raise CheckpointError(f"{where}: expected labels int32[{len(images)}], got {labels.dtype}{list(labels.shape)}")
  if not np.isfinite(images).all():
    raise CheckpointError(f"{where}: images hold NaN or infinite pixels")
  tensors = {"images": images, "labels": labels, **{f"history.{name}": value for name, value in history.items()}}
  return {name: np.asarray(value, order="C") for name, value in tensors.items()}
