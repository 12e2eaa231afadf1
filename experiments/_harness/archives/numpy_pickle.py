"""Pickles of dicts with NumPy arrays, read without running anything that the file asks for."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from kwjax.errors import DataError, WeightsError
from weights_conversion.pickle_globals import Global, Stateful
from weights_conversion.pickle_reader import load_pickle

# The largest original, CIFAR-100's training set, takes 154 MB.
_MAX_BYTES = 1 << 28
_MAX_DEPTH = 16


def _encode(args: tuple[Any, ...]) -> bytes:
  """How Python 3 writes bytes for protocol 2."""
  if len(args) != 2 or not isinstance(args[0], str) or args[1] != "latin1":
    raise WeightsError("its pickle encodes something that is no latin-1 text")
  return args[0].encode("latin-1")


def _names() -> dict[str, Global]:
  names = {"numpy.ndarray": Global("numpy.ndarray"), "_codecs.encode": Global("_codecs.encode", _encode)}
  array = "numpy.core.multiarray._reconstruct"
  for spelling in (array, array.replace("core", "_core")):
    names[spelling] = Global(spelling, lambda args: Stateful("array", args))
  return names | {"numpy.dtype": Global("numpy.dtype", lambda args: Stateful("dtype", args))}


_NAMES = _names()


def _find(module: str, name: str) -> Global:
  found = _NAMES.get(f"{module}.{name}")
  if found is None:
    shown = f"{module}.{name}".encode("ascii", "backslashreplace").decode()[:120]
    raise WeightsError(f"refused, nothing was run: its pickle asks for {shown!r}, an array needs no such name")
  return found


def load_numpy_pickle(data: bytes, where: str) -> Any:
  """The plain data and the uint8 arrays in a pickle of Python 2 or 3.

  Args:
    data: the pickle.
    where: what to call it in an error.

  Returns: numbers, str, list, tuple and dict with text as keys, nested, and `np.ndarray` of uint8.

  Raises:
    DataError: it is damaged, or asks for a name that an array does not need.
  """
  try:
    return _plain(load_pickle(io.BytesIO(data), names=_find, max_bytes=_MAX_BYTES), _MAX_DEPTH)
  except WeightsError as error:
    raise DataError(f"{where}: {error}") from error


def _plain(value: Any, depth: int) -> Any:
  if depth == 0:
    raise WeightsError(f"its pickle is nested more than {_MAX_DEPTH} deep")
  if isinstance(value, Stateful):
    return _array(value)
  if isinstance(value, list | tuple):
    return type(value)(_plain(item, depth - 1) for item in value)
  if isinstance(value, dict):
    return {_text(key): _plain(item, depth - 1) for key, item in value.items()}
  return value


def _text(key: Any) -> Any:
  return key.decode("latin-1") if isinstance(key, bytes) else key


def _array(value: Stateful) -> np.ndarray:
  """State of an array: version, shape, type, whether in Fortran order, bytes (a Python 2 string comes as latin-1)."""
  state = value.states[-1] if value.states else None
  if value.name != "array" or not isinstance(state, tuple) or len(state) != 5:
    raise WeightsError("its pickle has an array without a content")
  _, shape, dtype, fortran, content = state
  if not isinstance(dtype, Stateful) or dtype.name != "dtype" or dtype.args[:1] not in (("u1",), (b"u1",)):
    raise WeightsError("its pickle has an array of another type than uint8")
  content = content.encode("latin-1", "replace") if isinstance(content, str) else content
  if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape) or len(shape) > 8:
    raise WeightsError("its pickle has an array without a usable shape")
  if not isinstance(content, bytes | bytearray) or len(content) != int(np.prod(shape, dtype=object)):
    raise WeightsError(f"its pickle has an array of shape {shape} whose content is of another length")
  return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")
