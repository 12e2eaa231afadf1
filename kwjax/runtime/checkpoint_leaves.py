"""The leaves of a checkpoint: their description, and the conversion to arrays and back."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.errors import CheckpointError

PyTree = Any


def named_leaves(tree: PyTree) -> tuple[list[str], list[Any]]:
  """Paths and values of a pytree's leaves, in order."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [jax.tree_util.keystr(path) or "(root)" for path, _ in flat], [leaf for _, leaf in flat]


def is_key(leaf: Any) -> bool:
  """Whether a leaf is a typed random key, or the shape of one."""
  return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_numpy(leaf: Any) -> np.ndarray:
  """A leaf as an array in C order; for a random key, its data."""
  # order="C" gives the checksum one byte order; ascontiguousarray would turn a scalar into a vector.
  return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf, order="C")


def sha256_array(array: np.ndarray) -> str:
  """SHA-256 of an array's bytes; the array is in C order."""
  return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def storage_key(index: int) -> str:
  """Name under which the leaf of that number is stored."""
  return f"leaf_{index:05d}"


def check_template(leaves: list[dict[str, Any]], template: PyTree, where: pathlib.Path) -> None:
  """Refuse a checkpoint whose metadata describes other leaves than those of `template`.

  Raises:
    CheckpointError: with the checkpoint, the first leaf that differs, and both its descriptions.
  """
  names, wanted = named_leaves(template)
  stored = [leaf["name"] for leaf in leaves]
  if stored != names:
    extra, missing = sorted(set(stored) - set(names)), sorted(set(names) - set(stored))
    raise CheckpointError(f"checkpoint {where} has another structure: lacks {missing}, has unknown {extra}")
  for leaf, like in zip(leaves, wanted):
    found, expected = _describe(leaf["dtype"], leaf["shape"], leaf["key"]), _describe_template(like)
    if found != expected:
      raise CheckpointError(f"checkpoint {where}, leaf {leaf['name']}: expected {expected}, found {found}")


def _describe(dtype: str, shape: Sequence[int], key: str | None) -> str:
  return f"{f'random key {key} of ' if key else ''}{dtype}{list(shape)}"


def _describe_template(like: Any) -> str:
  if is_key(like):
    # A ShapeDtypeStruct does not name the implementation behind its dtype; a key of that dtype does.
    concrete = like if isinstance(like, jax.Array) else jnp.zeros((), like.dtype)
    data = jax.eval_shape(jax.random.key_data, like)
    return _describe(data.dtype.name, data.shape, str(jax.random.key_impl(concrete)))
  array = like if hasattr(like, "dtype") else np.asarray(like)
  return _describe(jnp.dtype(array.dtype).name, array.shape, None)


def like_template(arrays: list[np.ndarray], leaves: list[dict[str, Any]], template: PyTree) -> PyTree:
  """The template's structure with the stored values; each has its template's kind, see `Checkpoints.restore`."""
  likes, structure = jax.tree_util.tree_flatten(template)
  restored = [_like(array, leaf, like) for array, leaf, like in zip(arrays, leaves, likes)]
  return jax.tree_util.tree_unflatten(structure, restored)


def _like(array: np.ndarray, leaf: dict[str, Any], like: Any) -> Any:
  if isinstance(like, (bool, int, float, complex)):
    return type(like)(array.item())
  if isinstance(like, (np.ndarray, np.generic)):
    return array
  if is_key(like):
    return jax.random.wrap_key_data(jnp.asarray(array), impl=leaf["key"])
  sharding = getattr(like, "sharding", None)
  return jax.device_put(array, sharding) if sharding is not None else jnp.asarray(array)
