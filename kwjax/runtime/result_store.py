"""Results of the finished parts of a run, kept in its folder or, without one, in memory."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from kwjax.errors import CheckpointError, KwjaxError
from kwjax.runtime.devices import processes
from kwjax.runtime.files import (
  PathLike,
  canonical_json,
  check_settings,
  read_sealed_json,
  settings_differences,
  write_sealed_json,
)
from kwjax.runtime.reporting.messages import log


class ResultStore:
  """Results by name, so that a resumed run computes none of them twice.

  Always: a folder holds the results of one set of settings.

  Attributes:
    folder: of the run; None: results are kept in memory and nothing is written.
  """

  def __init__(self, folder: PathLike | None, settings: Mapping[str, Any]) -> None:
    """Opens the folder of a run, which exists.

    Args:
      folder: of the run, or None.
      settings: everything that the results depend on, JSON-able.

    Raises:
      CheckpointError: the folder belongs to a run with other settings; each difference is named.
    """
    self.folder = None if folder is None else pathlib.Path(folder)
    self._in_memory: dict[str, str] = {}
    if self.folder is None:
      return
    place, path = self.folder, self.folder / "settings.json"

    def open_folder() -> None:
      if path.exists():
        check_settings(place, _stored_settings(path), settings)
      else:
        write_sealed_json(path, settings)

    processes.from_main(open_folder)

  def subfolder(self, name: str) -> pathlib.Path | None:
    """A folder inside the run's, which need not exist; None where nothing is written."""
    return None if self.folder is None else self.folder / name

  def path(self, name: str) -> pathlib.Path | None:
    """The file of a result, which need not exist; None where nothing is written."""
    return None if self.folder is None else self.folder / "stages" / f"{name}.json"

  def once(self, name: str, compute: Callable[[], Any]) -> Any:
    """The JSON-able result of `compute`, computed at most once in the life of the folder unless its file is damaged.

    All processes compute, one writes, and all read. Infinity and NaN become None.
    """
    path = self.path(name)
    if path is None:
      if name not in self._in_memory:
        # As text, so that what a caller does to a result changes nothing here.
        self._in_memory[name] = json.dumps(_finite(compute()))
      return json.loads(self._in_memory[name])

    def is_finished() -> bool:
      if not path.exists():
        return False
      try:
        read_sealed_json(path)
      except CheckpointError as error:
        log(f"{error}; it is computed again")
        return False
      return True

    if not processes.from_main(is_finished):
      result = _finite(compute())
      processes.from_main(lambda: str(write_sealed_json(path, {"result": result})))
    return read_sealed_json(path)["result"]


def check_same_settings(settings: Mapping[str, Any]) -> None:
  """Refuse processes of one run that would not do the same work.

  Raises:
    KwjaxError: their settings, networks or data sets differ.
  """
  everybody = processes.exchange(json.loads(canonical_json(settings)))
  for index, other in enumerate(everybody):
    differences = settings_differences(everybody[0], other)
    if differences:
      raise KwjaxError(f"process {index} of {len(everybody)} was started with other options than 0: {differences[0]}")


def _stored_settings(path: pathlib.Path) -> dict[str, Any]:
  try:
    return read_sealed_json(path)
  except CheckpointError as error:
    # Without them nothing tells whose results the folder holds.
    raise CheckpointError(f"{error}; --no-resume starts over in this folder") from error


def _finite(value: Any) -> Any:
  """JSON has no infinity: the signal-to-noise ratio of an exact student, say, becomes null."""
  if isinstance(value, Mapping):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
