"""Event files that TensorBoard shows, written without TensorFlow; what an earlier run wrote is read first and not repeated."""

from __future__ import annotations

import contextlib
import pathlib
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kwjax.errors import KwjaxError
from kwjax.optional import require
from kwjax.runtime.files import PathLike
from kwjax.runtime.reporting.parts import Tile, tile_png

_LENGTH = struct.Struct("<Q")  # bytes of a record
_CHECKSUM = struct.Struct("<I")  # one after the length, one after the record


class EventLog:
  """Scalars, images and texts of one run.

  Always: a tag has at most one entry a step over all files of the folder, so that a run that was stopped and goes on
  from a checkpoint shows one curve; and what a method was given is on disk when it returns.
  """

  def __init__(self, folder: PathLike) -> None:
    """Starts a file in a folder, which is made where there is none.

    Raises:
      KwjaxError: tensorboardX is not installed, or the folder cannot be written.
    """
    writer, self._event, self._summary = _library()
    place = pathlib.Path(folder)
    try:
      place.mkdir(parents=True, exist_ok=True)
      self._written = {(tag, step) for tag, steps in read_events(place).items() for step in steps}
      # Two runs within a second would have the same name but for the number.
      number = len(list(place.glob("*tfevents*")))
      self._writer = writer(str(place / "events"), filename_suffix=f".{number}")
    except OSError as error:
      raise KwjaxError(f"cannot write the TensorBoard log {place}: {error.strerror or error}") from error

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Values of one step by tag; those that are there already are left as they are."""
    for tag, value in values.items():
      if self._is_new(tag, step):
        self._write(tag, step, self._summary.scalar(tag, float(value)))
    self._writer.flush()

  def curves(
    self,
    group: str,
    first: int,
    curves: Mapping[str, Sequence[float] | np.ndarray],
    *,
    learning_rate: Callable[[int], float] | None = None,
  ) -> None:
    """Values of consecutive steps, as far as they are not there yet.

    Args:
      group: in front of every name: `group/name`.
      first: steps done before the first value, which stands at step `first + 1`.
      curves: name -> f32[t], all of one length t.
      learning_rate: of the i-th of these steps, from 0; written beside them as `group/learning_rate`.
    """
    known: dict[str, Callable[[int], float]] = {name: values.__getitem__ for name, values in curves.items()}
    if learning_rate is not None:
      known["learning_rate"] = learning_rate
    for i in range(max((len(values) for values in curves.values()), default=0)):
      for name, value in known.items():
        tag, step = f"{group}/{name}", first + i + 1
        if self._is_new(tag, step):
          self._write(tag, step, self._summary.scalar(tag, float(value(i))))
    self._writer.flush()

  def image(self, tag: str, image: np.ndarray, step: int = 0) -> None:
    """A picture [h,w,c], c 1 or 3: floats in [0, 1] or uint8.

    Raises:
      KwjaxError: it does not have that form.
    """
    height, width, channels = np.shape(image) if np.ndim(image) == 3 else (0, 0, 0)
    png = tile_png(Tile(image))
    if self._is_new(tag, step):
      made = self._summary.Summary
      content = made.Image(height=height, width=width, colorspace=channels, encoded_image_string=png)
      self._write(tag, step, made(value=[made.Value(tag=tag, image=content)]))
    self._writer.flush()

  def text(self, tag: str, markdown: str, step: int = 0) -> None:
    """A text, shown as Markdown."""
    # TensorBoard finds texts under this ending.
    if self._is_new(f"{tag}/text_summary", step):
      self._write(f"{tag}/text_summary", step, self._summary.text(tag, markdown))
    self._writer.flush()

  def close(self) -> None:
    """Close the file."""
    self._writer.close()

  def _is_new(self, tag: str, step: int) -> bool:
    return (tag, step) not in self._written

  def _write(self, tag: str, step: int, summary: Any) -> None:
    self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
    self._written.add((tag, step))


@contextlib.contextmanager
def open_log(folder: PathLike | None) -> Iterator[EventLog | None]:
  """An `EventLog` that is closed at the end; None without a folder."""
  if folder is None:
    yield None
    return
  log = EventLog(folder)
  try:
    yield log
  finally:
    log.close()


def read_events(folder: PathLike) -> dict[str, dict[int, Any]]:
  """`{tag: {step: value}}` of all event files of a folder; the value of an image or text is its summary as stored.

  A record that was cut off, by a kill say, ends its file.

  Raises:
    KwjaxError: tensorboardX is not installed, or a file holds something else.
  """
  _, event_type, _ = _library()
  from google.protobuf.message import DecodeError

  found: dict[str, dict[int, Any]] = {}
  for path in sorted(pathlib.Path(folder).glob("*tfevents*")):
    for record in _records(path):
      event = event_type()
      try:
        event.ParseFromString(record)
      except DecodeError as error:
        raise KwjaxError(f"{path} is damaged or not a TensorBoard log: {error}") from error
      for value in event.summary.value:
        shown = value.simple_value if value.WhichOneof("value") == "simple_value" else value
        found.setdefault(value.tag, {})[event.step] = shown
  return found


def _records(path: pathlib.Path) -> Iterator[bytes]:
  data, at = path.read_bytes(), 0
  head = _LENGTH.size + _CHECKSUM.size
  while at + head <= len(data):
    (length,) = _LENGTH.unpack_from(data, at)
    end = at + head + length
    if end + _CHECKSUM.size > len(data):
      return
    yield data[at + head : end]
    at = end + _CHECKSUM.size


def _library() -> tuple[Any, Any, Any]:
  """Synchronous writer, event type and summaries of tensorboardX.

  Its `SummaryWriter` has a queue that `flush` does not empty: what it holds is lost when a run is killed.
  """
  summary, files, events = (
    require(f"tensorboardX.{name}", extra="tensorboard", purpose="a TensorBoard log")
    for name in ("summary", "event_file_writer", "proto.event_pb2")
  )
  return files.EventsWriter, events.Event, summary
