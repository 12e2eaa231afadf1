"""State of a running optimisation on disk: safe against a kill at any moment, checked bit by bit on its return."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from kwjax.errors import CheckpointError
from kwjax.runtime.files import (
  PathLike,
  atomic_write,
  canonical_json,
  check_settings,
  read_json,
  settings_differences,
  sha256_file,
  write_json,
)

__all__ = [
  "Checkpoints",
  "Restored",
  "atomic_write",
  "check_settings",
  "read_json",
  "settings_differences",
  "sha256_file",
  "write_json",
]

PyTree = Any


class Restored(NamedTuple):
  """What `Checkpoints.restore` found: the step, the state as saved, and the small values kept beside it."""

  step: int
  state: PyTree
  extra: dict[str, Any]


class _Damaged(Exception):
  """One stored step cannot be trusted; the text says why."""


class Checkpoints:
  """The last few states of a run in `folder`.

  Invariant: a step is in the folder as a whole or not at all, and what `restore` returns has the SHA-256 it was saved
  with. Saving blocks until the step is on disk: an asynchronous save gains little at these sizes, and after a full disk
  it has already dropped an older step.

  Use as a context manager. One process writes a folder at a time (`kwjax.runtime.workdir.lock_workdir`).
  """

  def __init__(self, folder: PathLike, *, keep: int = 2) -> None:
    """Opens or makes the folder and removes what a killed save left behind.

    Args:
      folder: where the steps go; nothing else should be in it.
      keep: how many steps stay, at least 1; with 2, one damaged step costs one interval.

    Raises:
      CheckpointError: `keep` is below 1, or the folder cannot be made.
    """
    if keep < 1:
      raise CheckpointError(f"keep must be at least 1, got {keep}")
    self.folder = pathlib.Path(folder).absolute()
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      for entry in self.folder.glob("*orbax-checkpoint-tmp*"):
        shutil.rmtree(entry)
    except OSError as error:
      raise CheckpointError(f"cannot keep checkpoints in {self.folder}: {error.strerror}") from error
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    self._manager = ocp.CheckpointManager(self.folder, options=options)

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Waits for what is under way and lets go of the folder."""
    self._manager.close()

  def steps(self) -> list[int]:
    """The stored steps, oldest first; a damaged one is listed until `restore` has met it."""
    return sorted(self._manager.all_steps())

  def save(
    self, step: int, state: PyTree, *, settings: Mapping[str, Any], extra: Mapping[str, Any] | None = None
  ) -> bool:
    """Stores a state; returns when it is on disk.

    Args:
      step: number of the state; larger than every stored one.
      state: pytree of JAX or NumPy arrays of any dtype, typed random keys, and Python numbers. In a run of several
        processes each array must be whole on this host.
      settings: what the state belongs to; `restore` compares it. Anything `canonical_json` takes.
      extra: small values to keep beside the state, JSON too (batch number, history).

    Returns:
      False if this very step is stored already (a step is pure, so its state is the same), otherwise True.

    Raises:
      CheckpointError: a later step is stored, or the disk is full; earlier steps are still there.
    """
    latest = self._manager.latest_step()
    if latest is not None and step <= latest:
      if step == latest:
        return False
      raise CheckpointError(f"cannot save step {step} in {self.folder}: step {latest} is stored already")
    names, leaves = _named_leaves(state)
    arrays = [_to_numpy(leaf) for leaf in leaves]
    body = {
      "settings": dict(settings),
      "extra": dict(extra or {}),
      "leaves": [
        {
          "name": name,
          "dtype": array.dtype.name,
          "shape": list(array.shape),
          "sha256": _sha256(array),
          "key": str(jax.random.key_impl(leaf)) if _is_key(leaf) else None,
        }
        for name, leaf, array in zip(names, leaves, arrays)
      ],
    }
    text = canonical_json(body)
    # Orbax refuses arrays without elements; dtype and shape in the metadata say all there is to say about them.
    stored = {_key(i): array for i, array in enumerate(arrays) if array.size}
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(stored or {"empty": np.zeros(1, np.int8)}),
      metadata=ocp.args.JsonSave({"body": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}),
    )
    try:
      self._manager.save(step, args=items, force=True)
    # Orbax passes on what TensorStore, the file system and its own threads raise, without a common base class.
    except Exception as error:
      raise CheckpointError(
        f"cannot save step {step} in {self.folder}: {_first_line(error)}; earlier steps are unchanged: {self.steps()}"
      ) from error
    return True

  def restore(self, template: PyTree, *, settings: Mapping[str, Any]) -> Restored | None:
    """Returns the newest state whose every byte is as it was saved.

    A damaged step is reported with a warning, moved aside to `damaged-STEP`, and the step before is taken.

    Args:
      template: pytree with the structure, shapes and dtypes of the state; arrays or `jax.ShapeDtypeStruct`. Each leaf
        comes back as its template's kind: NumPy array, Python number, typed random key, or JAX array with the
        template's sharding.
      settings: what the state must belong to, as given to `save`.

    Returns:
      `Restored(step, state, extra)`, or None if nothing is stored.

    Raises:
      CheckpointError: the stored state belongs to other settings (each is named with both values) or does not fit the
        template (the first such leaf is named), or every stored step is damaged.
    """
    damaged: list[tuple[int, str]] = []
    for step in reversed(self.steps()):
      try:
        body = self._metadata(step)
        check_settings(f"checkpoint {self.folder / str(step)}", body["settings"], settings)
        _check_template(body["leaves"], template, self.folder / str(step))
        state = _like_template(self._arrays(step, body["leaves"]), body["leaves"], template)
      except _Damaged as error:
        damaged.append((step, str(error)))
        continue
      for bad, reason in damaged:
        self._set_aside(bad, reason, step)
      return Restored(step, state, body["extra"])
    if damaged:
      reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged)
      raise CheckpointError(
        f"every checkpoint in {self.folder} is damaged ({reasons}); remove the folder to start again"
      )
    return None

  def _metadata(self, step: int) -> dict[str, Any]:
    try:
      found = self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())).metadata
      text, expected = found["body"], found["sha256"]
    # Whatever goes wrong while reading (lost file, bad JSON, missing key) means the same: this step is unusable.
    except Exception as error:
      raise _Damaged(f"metadata unreadable, {_first_line(error)}") from error
    if hashlib.sha256(text.encode()).hexdigest() != expected:
      raise _Damaged("metadata does not have the SHA-256 it was saved with")
    return json.loads(text)

  def _arrays(self, step: int, leaves: list[dict[str, Any]]) -> list[np.ndarray]:
    try:
      found = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    except Exception as error:
      raise _Damaged(f"state unreadable, {_first_line(error)}") from error
    arrays = []
    for i, leaf in enumerate(leaves):
      dtype = jnp.dtype(leaf["dtype"])
      array = np.asarray(found[_key(i)]) if _key(i) in found else np.zeros(leaf["shape"], dtype)
      if array.dtype != dtype or list(array.shape) != leaf["shape"] or _sha256(array) != leaf["sha256"]:
        raise _Damaged(f"leaf {leaf['name']} does not have the SHA-256 it was saved with")
      arrays.append(array)
    return arrays

  def _set_aside(self, step: int, reason: str, used: int) -> None:
    source, target = self.folder / str(step), self.folder / f"damaged-{step}"
    warnings.warn(
      f"checkpoint {source} is damaged ({reason}); it is moved to {target.name} and step {used} is used instead",
      stacklevel=3,
    )
    if target.exists():
      shutil.rmtree(target)
    source.rename(target)
    self._manager.reload()


def _named_leaves(tree: PyTree) -> tuple[list[str], list[Any]]:
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [jax.tree_util.keystr(path) or "(root)" for path, _ in flat], [leaf for _, leaf in flat]


def _is_key(leaf: Any) -> bool:
  return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_numpy(leaf: Any) -> np.ndarray:
  # order="C" gives the checksum one byte order; ascontiguousarray would turn a scalar into a vector.
  return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf, order="C")


def _sha256(array: np.ndarray) -> str:
  return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def _key(index: int) -> str:
  return f"leaf_{index:05d}"


def _first_line(error: Exception) -> str:
  return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def _check_template(leaves: list[dict[str, Any]], template: PyTree, where: pathlib.Path) -> None:
  names, wanted = _named_leaves(template)
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
  if _is_key(like):
    # A ShapeDtypeStruct does not tell which implementation its dtype stands for; a key of that dtype does.
    concrete = like if isinstance(like, jax.Array) else jnp.zeros((), like.dtype)
    data = jax.eval_shape(jax.random.key_data, like)
    return _describe(data.dtype.name, data.shape, str(jax.random.key_impl(concrete)))
  array = like if hasattr(like, "dtype") else np.asarray(like)
  return _describe(jnp.dtype(array.dtype).name, array.shape, None)


def _like_template(arrays: list[np.ndarray], leaves: list[dict[str, Any]], template: PyTree) -> PyTree:
  likes, structure = jax.tree_util.tree_flatten(template)
  restored = [_like(array, leaf, like) for array, leaf, like in zip(arrays, leaves, likes)]
  return jax.tree_util.tree_unflatten(structure, restored)


def _like(array: np.ndarray, leaf: dict[str, Any], like: Any) -> Any:
  if isinstance(like, (bool, int, float, complex)):
    return type(like)(array.item())
  if isinstance(like, (np.ndarray, np.generic)):
    return array
  if _is_key(like):
    return jax.random.wrap_key_data(jnp.asarray(array), impl=leaf["key"])
  sharding = getattr(like, "sharding", None)
  return jax.device_put(array, sharding) if sharding is not None else jnp.asarray(array)
