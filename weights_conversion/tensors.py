"""Tensors and storages as described in a checkpoint: plain records that become arrays after bounds checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from kwjax.errors import WeightsError

MAX_RANK = 16
# Views can repeat bytes of their storage (expanded tensors), but real state dicts rarely do. A file whose tensors need far
# more memory than its size is an attack or damaged.
MAX_EXPANSION = 16
MIN_BUDGET_BYTES = 1 << 26

STORAGE_DTYPES: Mapping[str, str] = {
  "FloatStorage": "f4",
  "DoubleStorage": "f8",
  "HalfStorage": "f2",
  "BFloat16Storage": "bf16",
  "LongStorage": "i8",
  "IntStorage": "i4",
  "ShortStorage": "i2",
  "CharStorage": "i1",
  "ByteStorage": "u1",
  "BoolStorage": "?",
}


@dataclasses.dataclass(frozen=True)
class Storage:
  """A block of `numel` elements kept elsewhere in the file under `key`; `offset` counts elements from its start."""

  dtype: str
  key: str
  numel: int
  offset: int = 0

  @property
  def itemsize(self) -> int:
    """Bytes of one element."""
    return 2 if self.dtype == "bf16" else np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class TensorView:
  """A strided view of a storage; offset, size and stride count elements, as in PyTorch."""

  storage: Storage
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]

  @property
  def numel(self) -> int:
    """Number of elements (an unbounded integer: nothing is allocated for it)."""
    count = 1
    for length in self.size:
      count *= length
    return count


def make_view(storage: object, offset: object, size: object, stride: object) -> TensorView:
  """Check that a view lies inside its storage.

  Raises:
    WeightsError: a field has the wrong type, is negative, or the view reaches past the end of its storage.
  """
  if not isinstance(storage, Storage):
    raise WeightsError(f"a tensor has a {type(storage).__name__} for a storage")
  if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride) or len(size) > MAX_RANK:
    raise WeightsError(f"a tensor in storage {storage.key} has no usable size and stride")
  numbers = (offset, *size, *stride)
  if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
    raise WeightsError(f"a tensor in storage {storage.key} has an offset, size or stride that is no count of elements")
  view = TensorView(storage, storage.offset + int(offset), size, stride)  # type: ignore[call-overload]
  reach = view.offset + sum((n - 1) * step for n, step in zip(size, stride)) + 1 if view.numel else view.offset
  if reach > storage.offset + storage.numel:
    raise WeightsError(
      f"a tensor of shape {size} reaches element {reach} of storage {storage.key}, which has {storage.numel} elements"
    )
  return view


def materialize(
  views: Mapping[str, TensorView], load: Callable[[Storage], bytes], *, file_bytes: int, big_endian: bool = False
) -> dict[str, np.ndarray]:
  """Read the storages that `views` use, each once, and copy every view out as a contiguous array.

  Args:
    views: tensors by name.
    load: returns the raw bytes of a whole storage, at least `numel * itemsize` of them.
    file_bytes: size of the file, which bounds what its tensors may need.
    big_endian: byte order of the stored elements.

  Returns: arrays in native byte order; bfloat16 becomes float32, everything else keeps its type.

  Raises:
    WeightsError: the tensors would need far more memory than the file has bytes, or a storage is too short.
  """
  needed = sum(view.numel * view.storage.itemsize for view in views.values())
  budget = MAX_EXPANSION * file_bytes + MIN_BUDGET_BYTES
  if needed > budget:
    raise WeightsError(f"its tensors would need {needed} bytes of memory, too many for a file of {file_bytes} bytes")
  by_storage: dict[tuple[str, str], list[str]] = {}
  for name, view in views.items():
    by_storage.setdefault((view.storage.key, view.storage.dtype), []).append(name)
  arrays: dict[str, np.ndarray] = {}
  for names in by_storage.values():
    flat = elements(load(views[names[0]].storage), views[names[0]].storage.dtype, big_endian)
    for name in names:
      arrays[name] = _copy_out(flat, views[name])
  return {name: arrays[name] for name in views}


def elements(raw: bytes, dtype: str, big_endian: bool = False) -> np.ndarray:
  """The elements of a storage as a flat read-only array in the stored byte order; bfloat16 as its bits in uint16."""
  stored = np.dtype("u2" if dtype == "bf16" else dtype).newbyteorder(">" if big_endian else "<")
  return np.frombuffer(raw, stored, count=len(raw) // stored.itemsize)


def to_native(stored: np.ndarray, dtype: str) -> np.ndarray:
  """A contiguous copy in native byte order; the bits of bfloat16 become float32."""
  native = np.array(stored, dtype=stored.dtype.newbyteorder("="), order="C")
  return (native.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else native


def _copy_out(flat: np.ndarray, view: TensorView) -> np.ndarray:
  reach = view.offset + sum((n - 1) * step for n, step in zip(view.size, view.stride)) + 1 if view.numel else 0
  if reach > flat.size:
    raise WeightsError(f"storage {view.storage.key} holds {flat.size} elements, a tensor needs {reach}")
  if not view.numel:
    return np.zeros(view.size, np.float32 if view.storage.dtype == "bf16" else view.storage.dtype)
  strides = tuple(step * flat.itemsize for step in view.stride)
  strided = np.lib.stride_tricks.as_strided(flat[view.offset :], view.size, strides, writeable=False)
  return to_native(strided, view.storage.dtype)
