"""Reads PyTorch and safetensors weight files into NumPy arrays, without PyTorch and without running their code."""

from __future__ import annotations

import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors

from kwjax.errors import WeightsError
from weights_conversion.pickle_globals import Global
from weights_conversion.pickle_reader import MAX_PICKLE_BYTES, load_pickle, load_pickle_bytes
from weights_conversion.state_dict import find_state_dict, strip_prefixes
from weights_conversion.tensors import Storage, elements, materialize, to_native

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
_SAFETENSORS_DTYPES = {
  "F64": "f8",
  "F32": "f4",
  "F16": "f2",
  "BF16": "bf16",
  "I64": "i8",
  "I32": "i4",
  "I16": "i2",
  "I8": "i1",
  "U8": "u1",
  "BOOL": "?",
}
# Errors of zipfile on damaged archives, besides its own.
_ZIP_ERRORS = (
  zipfile.BadZipFile,
  zipfile.LargeZipFile,
  NotImplementedError,
  EOFError,
  KeyError,
  OSError,
  OverflowError,
  RuntimeError,
  ValueError,
  struct.error,
  zlib.error,
)


class Weights(NamedTuple):
  """A state dict and its context in the file.

  Attributes:
    arrays: `{"layer1.0.conv1.weight": array}`, prefixes such as `module.` removed.
    prefix: removed from the front of every name, for example `module.`.
    format: `torch zip`, `torch legacy` or `safetensors`.
    nested_under: keys that led to the state dict, for example `("state_dict",)`.
  """

  arrays: dict[str, np.ndarray]
  prefix: str
  format: str
  nested_under: tuple[str, ...]


def load_torch_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """The state dict in a `.pth`, `.th`, `.pth.tar`, `.pt` or `.safetensors` file, as NumPy arrays.

  The content decides the format, not the file name. A state dict nested under `state_dict`, `model`, `ema`, ... is found,
  and a common prefix such as `module.` is removed.

  Args:
    path: the file.

  Returns: arrays by name, in PyTorch's layout; bfloat16 as float32, every other type as stored.

  Raises:
    WeightsError: the file is unreadable, damaged, cut off or not a weight file, or its pickle uses a name that a state
      dict does not need. Nothing in the file is run.
  """
  return read_weights(path).arrays


def read_weights(path: str | os.PathLike[str]) -> Weights:
  """`load_torch_state_dict` with a record of the format, the nesting and the prefix; same arguments and errors."""
  path = pathlib.Path(path)
  with _naming(path):
    try:
      with open(path, "rb") as file:
        return _read(path, file)
    except FileNotFoundError:
      raise WeightsError("no such file") from None
    except IsADirectoryError:
      raise WeightsError("it is a folder, expected a .pth, .th, .pth.tar or .safetensors file") from None
    except OSError as error:
      raise WeightsError(f"cannot be read: {error.strerror or error}") from error


@contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except WeightsError as error:
    raise WeightsError(f"{path}: {error}") from error


def _read(path: pathlib.Path, file: BinaryIO) -> Weights:
  size = os.fstat(file.fileno()).st_size
  head = file.read(512)
  file.seek(0)
  if not head:
    raise WeightsError("the file is empty")
  if head.startswith(b"PK\x03\x04"):
    return _read_zip(file, size)
  if head[8:9] == b"{":  # before the next: a header length can begin with the first byte of a pickle
    return _read_safetensors(file)
  if head[:1] == b"\x80":
    return _read_legacy(file, size)
  raise WeightsError(_what_else(head, path))


def _what_else(head: bytes, path: pathlib.Path) -> str:
  text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
  if text.startswith((b"<!doctype", b"<html", b"<?xml")):
    return "it is a web page, not weights: the download was probably answered by a login or error page"
  if text.startswith(b"version https://git-lfs"):
    return "it is a Git LFS pointer, not weights: fetch the real file with `git lfs pull`"
  if head[257:262] == b"ustar":
    return "it is a tar archive (PyTorch before 0.2, or several files packed together), not a weight file"
  if head.startswith(b"\x1f\x8b"):
    return "it is gzip-compressed: unpack it first"
  if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head[:64]):
    return f"it is a text file, not weights; it begins with {head[:40].decode('ascii')!r}"
  return f"it is neither a PyTorch nor a safetensors file (its first bytes are {head[:8].hex(' ')})"


def _read_zip(file: BinaryIO, size: int) -> Weights:
  try:
    with zipfile.ZipFile(file) as archive:
      names = set(archive.namelist())
      pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
      if len(pickles) != 1:
        raise WeightsError(f"it is a zip archive with {len(pickles)} data.pkl records, a PyTorch file has exactly one")
      root = pickles[0].removesuffix("data.pkl")
      if f"{root}constants.pkl" in names:
        raise WeightsError("it is a TorchScript archive, which holds code: torch.save(model.state_dict()) instead")
      order = _record(archive, f"{root}byteorder", size, 16).strip() if f"{root}byteorder" in names else b"little"
      if order not in (b"little", b"big"):
        raise WeightsError("its byteorder record is neither 'little' nor 'big'")
      data = load_pickle_bytes(_record(archive, pickles[0], size, MAX_PICKLE_BYTES), _zip_storage)
      views, nested = find_state_dict(data)

      def load(storage: Storage) -> bytes:
        return _record(archive, f"{root}data/{storage.key}", size, size, storage.numel * storage.itemsize)

      arrays = materialize(views, load, file_bytes=size, big_endian=order == b"big")
  except WeightsError:
    raise
  except _ZIP_ERRORS as error:
    raise WeightsError(f"the zip archive is cut off or damaged ({str(error)[:120] or type(error).__name__})") from error
  return Weights(*strip_prefixes(arrays), "torch zip", nested)


def _record(archive: zipfile.ZipFile, name: str, file_bytes: int, limit: int, expected: int | None = None) -> bytes:
  """One record; PyTorch stores them uncompressed, so none can be longer than the file."""
  if name not in archive.NameToInfo:
    raise WeightsError(f"record {name[:120]!r} is missing")
  info = archive.getinfo(name)
  if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
    raise WeightsError(f"record {name[:120]!r} is compressed, which PyTorch never does")
  if info.file_size > min(limit, file_bytes):
    raise WeightsError(f"record {name[:120]!r} claims {info.file_size} bytes, which is more than the limit or the file")
  if expected is not None and info.file_size != expected:
    raise WeightsError(f"record {name[:120]!r} holds {info.file_size} bytes, expected {expected}")
  return archive.read(info)


def _storage_fields(identifier: Any, counts: tuple[int, ...]) -> Storage:
  if not isinstance(identifier, tuple) or len(identifier) not in counts or identifier[0] not in ("storage", b"storage"):
    raise WeightsError("its pickle has a persistent id that is no storage")
  kind, key, numel = identifier[1], identifier[2], identifier[4]
  if not isinstance(kind, Global) or kind.dtype is None:
    raise WeightsError("its pickle has a storage of unknown type")
  if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 1 << 62:
    raise WeightsError("its pickle has a storage without a usable key and length")
  return Storage(kind.dtype, key, numel)


def _zip_storage(identifier: Any) -> Storage:
  return _storage_fields(identifier, (5,))


def _legacy_storage(identifier: Any) -> Storage:
  storage = _storage_fields(identifier, (5, 6))
  view = identifier[5] if len(identifier) == 6 else None
  if view is None:
    return storage
  if not isinstance(view, tuple) or len(view) != 3 or not all(type(n) is int and n >= 0 for n in view[1:]):
    raise WeightsError(f"storage {storage.key} has an unusable view")
  if view[1] + view[2] > storage.numel:
    raise WeightsError(f"a view reaches element {view[1] + view[2]} of storage {storage.key} with {storage.numel}")
  return Storage(storage.dtype, storage.key, view[2], offset=view[1])


def _read_legacy(file: BinaryIO, size: int) -> Weights:
  if load_pickle(file) != LEGACY_MAGIC:
    raise WeightsError("it is a pickle, but not one that torch.save wrote (wrong magic number)")
  if load_pickle(file) != LEGACY_PROTOCOL:
    raise WeightsError(f"it has an unknown version of PyTorch's legacy format, expected {LEGACY_PROTOCOL}")
  load_pickle(file)  # sizes of C types on the machine that wrote it; the storages do not depend on them
  storages: dict[str, Storage] = {}

  def persistent_load(identifier: Any) -> Storage:
    storage = _legacy_storage(identifier)
    root = storages.setdefault(storage.key, Storage(storage.dtype, storage.key, identifier[4]))
    if (root.dtype, root.numel) != (storage.dtype, identifier[4]):
      raise WeightsError(f"storage {storage.key} is described in two ways")
    return storage

  data = load_pickle(file, persistent_load)
  keys = load_pickle(file)
  if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
    raise WeightsError("its list of storages does not fit the storages that its tensors use")
  places: dict[str, int] = {}
  for key in keys:
    storage = storages[key]
    header = file.read(8)
    numel = struct.unpack("<q", header)[0] if len(header) == 8 else None
    start, length = file.tell(), storage.numel * storage.itemsize
    if numel is None or start + length > size:
      raise WeightsError(f"cut off: storage {key} needs {length} bytes, {max(size - start, 0)} are left")
    if numel != storage.numel:
      raise WeightsError(f"damaged: storage {key} has {numel} elements where its tensors expect {storage.numel}")
    places[storage.key] = start
    file.seek(start + length)

  def load(storage: Storage) -> bytes:
    root = storages[storage.key]
    file.seek(places[storage.key])
    return file.read(root.numel * root.itemsize)

  views, nested = find_state_dict(data)
  return Weights(*strip_prefixes(materialize(views, load, file_bytes=size)), "torch legacy", nested)


def _read_safetensors(file: BinaryIO) -> Weights:
  try:
    entries = safetensors.deserialize(file.read())
  except (safetensors.SafetensorError, ValueError) as error:
    raise WeightsError(f"it is not a safetensors file, or is cut off or damaged ({str(error)[:120]})") from error
  arrays: dict[str, np.ndarray] = {}
  for name, entry in entries:
    dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
    if dtype is None:
      raise WeightsError(f"tensor {name!r} has type {entry['dtype']}, expected one of {', '.join(_SAFETENSORS_DTYPES)}")
    arrays[name] = to_native(elements(entry["data"], dtype), dtype).reshape(entry["shape"])
  if not arrays:
    raise WeightsError("it holds no tensors")
  if all(name.startswith(("params/", "batch_stats/")) for name in arrays):
    raise WeightsError("it is already converted: read its folder with kwjax.network.load_network")
  return Weights(*strip_prefixes(arrays), "safetensors", ())
