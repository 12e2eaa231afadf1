"""Checkpoints of a run: safe against a kill at any time, and verified bit by bit when restored."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.errors import CheckpointError
from kwjax.runtime.checkpoint_leaves import (
  check_template,
  is_key,
  like_template,
  named_leaves,
  sha256_array,
  storage_key,
  to_numpy,
)
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

# The system's texts for a file that cannot be written; libraries quote them in their own errors.
_SYSTEM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


class Restored(NamedTuple):
  """The result of `Checkpoints.restore`: the step, the state as saved, and the small values saved with it."""

  step: int
  state: PyTree
  extra: dict[str, Any]


class _Damaged(Exception):
  """One stored step is damaged; the text says why."""


class Checkpoints:
  """The last few states of a run in `folder`.

  Invariant: a step is in the folder whole or not at all, and `restore` returns arrays with the SHA-256 they were saved
  with. Saving blocks until the step is on disk. An asynchronous save gains little at these sizes, and on a full disk it
  would already have dropped an older step.

  Use it as a context manager. Only one process writes a folder at a time (`kwjax.runtime.workdir.lock_workdir`). With
  several processes, each that keeps checkpoints has its own folder.
  """

  def __init__(self, folder: PathLike, *, keep: int = 2) -> None:
    """Open or make the folder, and remove the files of a killed save.

    Args:
      folder: of the steps; nothing else should be in it.
      keep: number of steps to keep, at least 1. With 2, one damaged step costs one interval.

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
    import orbax.checkpoint as ocp  # imported here: it takes longer to import than Flax

    # Otherwise Orbax waits for the other processes of the run at every call.
    alone = ocp.options.MultiprocessingOptions(
      primary_host=jax.process_index(),
      active_processes={jax.process_index()},
      barrier_sync_key_prefix=f"process-{jax.process_index()}",
    )
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      enable_async_checkpointing=False,
      **({"create": False, "multiprocessing_options": alone} if jax.process_count() > 1 else {}),
    )
    self._manager = ocp.CheckpointManager(self.folder, options=options)

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Wait for pending work and release the folder."""
    self._manager.close()

  def steps(self) -> list[int]:
    """The stored steps, oldest first. A damaged step is listed until `restore` finds it."""
    return sorted(self._manager.all_steps())

  def save(
    self, step: int, state: PyTree, *, settings: Mapping[str, Any], extra: Mapping[str, Any] | None = None
  ) -> bool:
    """Store a state; returns when it is on disk.

    Args:
      step: number of the state; larger than every stored one.
      state: pytree of JAX or NumPy arrays of any dtype, typed random keys, and Python numbers. In a run of several
        processes each array must be whole on this host.
      settings: of the run; `restore` compares them. Any value for `canonical_json`.
      extra: small JSON values to save with the state (batch number, history).

    Returns:
      False if this step is stored already (a step is pure, so its state is the same), otherwise True.

    Raises:
      CheckpointError: a later step is stored, or the disk is full; earlier steps are still there.
    """
    latest = self._manager.latest_step()
    if latest is not None and step <= latest:
      if step == latest:
        return False
      raise CheckpointError(f"cannot save step {step} in {self.folder}: step {latest} is stored already")
    names, leaves = named_leaves(state)
    arrays = [to_numpy(leaf) for leaf in leaves]
    body = {
      "settings": dict(settings),
      "extra": dict(extra or {}),
      "leaves": [
        {
          "name": name,
          "dtype": array.dtype.name,
          "shape": list(array.shape),
          "sha256": sha256_array(array),
          "key": str(jax.random.key_impl(leaf)) if is_key(leaf) else None,
        }
        for name, leaf, array in zip(names, leaves, arrays)
      ],
    }
    import orbax.checkpoint as ocp

    text = canonical_json(body)
    # Orbax refuses arrays without elements; dtype and shape in the metadata describe them fully.
    stored = {storage_key(i): array for i, array in enumerate(arrays) if array.size}
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(stored or {"empty": np.zeros(1, np.int8)}),
      metadata=ocp.args.JsonSave({"body": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}),
    )
    try:
      with _without_log():
        self._manager.save(step, args=items, force=True)
    # Orbax passes on errors of TensorStore, the file system and its threads, without a common base class.
    except Exception as error:
      raise CheckpointError(
        f"cannot save step {step} in {self.folder}: {_first_line(error)}; earlier steps are unchanged: {self.steps()}"
      ) from error
    return True

  def restore(self, template: PyTree, *, settings: Mapping[str, Any]) -> Restored | None:
    """Return the newest undamaged state.

    A damaged step gives a warning and is moved to `damaged-STEP`; the step before is used.

    Args:
      template: pytree with the structure, shapes and dtypes of the state; arrays or `jax.ShapeDtypeStruct`. Each leaf
        comes back as its template's kind: NumPy array, Python number, typed random key, or JAX array with the
        template's sharding.
      settings: as given to `save`.

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
        check_template(body["leaves"], template, self.folder / str(step))
        state = like_template(self._arrays(step, body["leaves"]), body["leaves"], template)
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

  def intact_steps(self, template: PyTree, *, settings: Mapping[str, Any]) -> list[int]:
    """The undamaged steps, oldest first; arguments and errors as in `restore`."""
    intact = []
    for step in self.steps():
      try:
        body = self._metadata(step)
        check_settings(f"checkpoint {self.folder / str(step)}", body["settings"], settings)
        check_template(body["leaves"], template, self.folder / str(step))
        self._arrays(step, body["leaves"])
      except _Damaged:
        continue
      intact.append(step)
    return intact

  def forget_after(self, step: int) -> None:
    """Remove every stored step above `step`: another process lacks it, so the run resumes from an earlier one."""
    for later in [stored for stored in self.steps() if stored > step]:
      self._manager.delete(later)

  def _metadata(self, step: int) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    try:
      with _without_log():
        found = self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())).metadata
      text, expected = found["body"], found["sha256"]
    # Any failure while reading (lost file, bad JSON, missing key) means that this step is unusable.
    except Exception as error:
      raise _Damaged(f"metadata unreadable, {_first_line(error)}") from error
    if hashlib.sha256(text.encode()).hexdigest() != expected:
      raise _Damaged("metadata does not have the SHA-256 it was saved with")
    return json.loads(text)

  def _arrays(self, step: int, leaves: list[dict[str, Any]]) -> list[np.ndarray]:
    import orbax.checkpoint as ocp

    try:
      with _without_log():
        found = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    except Exception as error:
      raise _Damaged(f"state unreadable, {_first_line(error)}") from error
    arrays = []
    for i, leaf in enumerate(leaves):
      dtype = jnp.dtype(leaf["dtype"])
      array = np.asarray(found[storage_key(i)]) if storage_key(i) in found else np.zeros(leaf["shape"], dtype)
      if array.dtype != dtype or list(array.shape) != leaf["shape"] or sha256_array(array) != leaf["sha256"]:
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


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
  """Keep Orbax's threads from printing tracebacks; their errors are reported in one sentence."""

  def drop(record: logging.LogRecord) -> bool:
    return False

  def drop_late(unraisable: Any) -> None:
    # Pending work of TensorStore returns to an event loop that Orbax has closed.
    if str(unraisable.exc_value) != "Event loop is closed":
      hook(unraisable)

  logger, hook = logging.getLogger("absl"), sys.unraisablehook
  logger.addFilter(drop)
  sys.unraisablehook = drop_late
  try:
    yield
  finally:
    sys.unraisablehook = hook
    logger.removeFilter(drop)


def _first_line(error: Exception) -> str:
  system = [os.strerror(code) for code in _SYSTEM_ERRORS if os.strerror(code) in str(error)]
  if system or "RESOURCE_EXHAUSTED" in str(error):
    return system[0] if system else os.strerror(errno.ENOSPC)
  # TensorStore lists every layer of the error, the cause last, and then all its settings.
  text = re.split(r" \[[a-z_]+=", (str(error).splitlines() or [""])[0])[0]
  return f"{type(error).__name__}: {text if len(text) <= 300 else f'{text[:80]} ... {text[-220:]}'}"
