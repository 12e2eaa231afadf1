"""Writes PyTorch checkpoints byte by byte, honest and hostile ones, without PyTorch."""

from __future__ import annotations

import io
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from weights_conversion.torch_import import LEGACY_MAGIC, LEGACY_PROTOCOL

STORAGES = {"f4": "Float", "f8": "Double", "f2": "Half", "i8": "Long", "u1": "Byte", "bf16": "BFloat16"}


def text(value: str) -> bytes:
  data = value.encode()
  return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
  data = value.to_bytes(16, "little", signed=True)
  return b"\x8a\x10" + data


def tuple_of(*items: bytes) -> bytes:
  return b"(" + b"".join(items) + b"t"


def dict_of(items: Mapping[str, bytes]) -> bytes:
  return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def named(module: str, name: str) -> bytes:
  return f"c{module}\n{name}\n".encode()


def call(function: bytes, *args: bytes) -> bytes:
  return function + tuple_of(*args) + b"R"


def program(body: bytes, protocol: int = 2) -> bytes:
  return bytes([0x80, protocol]) + body + b"."


def storage(key: str, dtype: str, numel: int, *, legacy: bool = False) -> bytes:
  fields = [text("storage"), named("torch", f"{STORAGES[dtype]}Storage"), text(key), text("cpu"), integer(numel)]
  return tuple_of(*fields, *([b"N"] if legacy else [])) + b"Q"


def tensor(block: bytes, size: Sequence[int], stride: Sequence[int] | None = None, offset: int = 0) -> bytes:
  if stride is None:
    stride = [int(np.prod(size[axis + 1 :])) for axis in range(len(size))]
  lengths, steps = (tuple_of(*map(integer, numbers)) for numbers in (size, stride))
  hooks = call(named("collections", "OrderedDict"))
  return call(named("torch._utils", "_rebuild_tensor_v2"), block, integer(offset), lengths, steps, b"\x89", hooks)


def write_zip(
  path: pathlib.Path, pickled: bytes, storages: Mapping[str, bytes], byteorder: str | None = None
) -> pathlib.Path:
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", pickled)
    if byteorder:
      archive.writestr("archive/byteorder", byteorder)
    for key, data in storages.items():
      archive.writestr(f"archive/data/{key}", data)
    archive.writestr("archive/version", "3\n")
  return path


def write_legacy(path: pathlib.Path, pickled: bytes, storages: Mapping[str, tuple[int, bytes]]) -> pathlib.Path:
  buffer = io.BytesIO()
  for value in (LEGACY_MAGIC, LEGACY_PROTOCOL, {"little_endian": True, "protocol_version": LEGACY_PROTOCOL}):
    pickle.dump(value, buffer, protocol=2)
  buffer.write(pickled)
  pickle.dump(list(storages), buffer, protocol=2)
  for numel, data in storages.values():
    buffer.write(struct.pack("<q", numel) + data)
  path.write_bytes(buffer.getvalue())
  return path


def save_state_dict(path: pathlib.Path, arrays: Mapping[str, np.ndarray], *, legacy: bool = False) -> pathlib.Path:
  """A state dict of float32 and int64 arrays, one storage each, in the zip or the legacy format."""
  kinds = {name: "i8" if array.dtype == np.int64 else "f4" for name, array in arrays.items()}
  pickled = program(
    dict_of(
      {
        name: tensor(storage(str(index), kinds[name], array.size, legacy=legacy), array.shape)
        for index, (name, array) in enumerate(arrays.items())
      }
    )
  )
  raw = {
    str(index): np.ascontiguousarray(array, f"<{kinds[name]}").tobytes()
    for index, (name, array) in enumerate(arrays.items())
  }
  if legacy:
    sizes = {str(index): array.size for index, array in enumerate(arrays.values())}
    return write_legacy(path, pickled, {key: (sizes[key], data) for key, data in raw.items()})
  return write_zip(path, pickled, raw)
