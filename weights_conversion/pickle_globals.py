"""The complete list of names that a checkpoint's pickle may use. Each becomes inert data, never the real object."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from kwjax.errors import WeightsError
from weights_conversion.tensors import STORAGE_DTYPES, TensorView, make_view


@dataclasses.dataclass(frozen=True, eq=False)
class Inert:
  """Placeholder for a value that conversion does not need (a NumPy scalar, a device); its arguments are dropped."""

  name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Stateful(Inert):
  """An inert value that keeps its arguments and states as plain data."""

  args: tuple[Any, ...] = ()
  states: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Global:
  """A permitted name. `build` makes inert data from the arguments; names without it may only be mentioned."""

  name: str
  build: Callable[[tuple[Any, ...]], Any] | None = None
  dtype: str | None = None


def scalar_key(key: object, where: str) -> Any:
  """A dict key or set item, refused unless it is a scalar: hashing a deeply nested tuple overflows the C stack."""
  if key is None or type(key) in (str, bytes, int, float, bool):
    return key
  if isinstance(key, Inert | Global):
    return f"<{key.name}>"
  raise WeightsError(f"its pickle uses a {type(key).__name__} as a key of a {where}")


def _ordered_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
  items = args[0] if args else []
  if isinstance(items, dict):
    return dict(items)
  if len(args) > 1 or not isinstance(items, list):
    raise WeightsError("its pickle builds an OrderedDict from something that is no list of pairs")
  result: dict[Any, Any] = {}
  for item in items:
    if not isinstance(item, tuple | list) or len(item) != 2:
      raise WeightsError("its pickle builds an OrderedDict from something that is no list of pairs")
    result[scalar_key(item[0], "dict")] = item[1]
  return result


def _set(args: tuple[Any, ...]) -> set[Any]:
  items = args[0] if args else []
  if len(args) > 1 or not isinstance(items, list):
    raise WeightsError("its pickle builds a set from something that is no list")
  return {scalar_key(item, "set") for item in items}


def _size(args: tuple[Any, ...]) -> tuple[Any, ...]:
  if len(args) != 1 or not isinstance(args[0], tuple | list):
    raise WeightsError("its pickle builds a torch.Size from something that is no list of lengths")
  return tuple(args[0])


def _tensor(args: tuple[Any, ...]) -> TensorView:
  if len(args) < 4:
    raise WeightsError(f"its pickle builds a tensor from {len(args)} values, expected at least 4")
  metadata = args[6] if len(args) > 6 else None
  if isinstance(metadata, dict) and (metadata.get("conj") or metadata.get("neg")):
    raise WeightsError("it holds a tensor with a pending conjugation or negation: save tensor.resolve_neg() instead")
  return make_view(*(tuple(arg) if isinstance(arg, list) else arg for arg in args[:4]))


def _parameter(args: tuple[Any, ...]) -> TensorView:
  if not args or not isinstance(args[0], TensorView):
    raise WeightsError("its pickle builds a Parameter from something that is no tensor")
  return args[0]


def _inert(name: str) -> Global:
  return Global(name, lambda args: Inert(name))


_BUILDERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
  "collections.OrderedDict": _ordered_dict,
  "collections.Counter": _ordered_dict,
  "builtins.set": _set,
  "__builtin__.set": _set,
  "torch.Size": _size,
  "torch._utils._rebuild_tensor": _tensor,
  "torch._utils._rebuild_tensor_v2": _tensor,
  "torch._utils._rebuild_parameter": _parameter,
  "torch._utils._rebuild_parameter_with_state": _parameter,
  "torch.nn.parameter.Parameter": _parameter,
}
# Bookkeeping beside the weights: best_prec1 as a NumPy scalar, the command line of the training script, devices.
_INERT = (
  "numpy.core.multiarray.scalar",
  "numpy._core.multiarray.scalar",
  "numpy.core.multiarray._reconstruct",
  "numpy._core.multiarray._reconstruct",
  "numpy._core.numeric._frombuffer",
  "numpy.core.numeric._frombuffer",
  "numpy.dtype",
  "numpy.ndarray",
  "numpy.float64",
  "numpy.float32",
  "numpy.int64",
  "numpy.dtypes.Float64DType",
  "numpy.dtypes.Float32DType",
  "numpy.dtypes.Int64DType",
  "_codecs.encode",
  "argparse.Namespace",
  "torch.device",
  "torch.serialization._get_layout",
)
_TORCH_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")

ALLOWED: Mapping[str, Global] = {
  **{name: Global(name, build) for name, build in _BUILDERS.items()},
  **{name: _inert(name) for name in _INERT},
  **{f"torch.{name}": Global(f"torch.{name}") for name in _TORCH_DTYPES},
  **{
    f"{module}.{name}": Global(f"{module}.{name}", dtype=dtype)
    for module in ("torch", "torch.cuda")
    for name, dtype in STORAGE_DTYPES.items()
  },
}


def find_global(module: str, name: str) -> Global:
  """The inert stand-in of `module.name`.

  Raises:
    WeightsError: the name is not in the table; the message names it.
  """
  found = ALLOWED.get(f"{module}.{name}")
  if found is None:
    shown = f"{module}.{name}".encode("ascii", "backslashreplace").decode()[:120]
    raise WeightsError(
      f"refused, nothing was run: its pickle asks for {shown!r}, which is not among the names that a state dict needs"
      " (a whole pickled model? save model.state_dict() instead)"
    )
  return found
