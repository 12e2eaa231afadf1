"""Event files: read back by their record lengths and checksums, no step twice, nothing lost by a kill."""

from __future__ import annotations

import pathlib
import struct
import sys
from typing import Any

import numpy as np
import pytest

from kwjax.errors import KwjaxError
from kwjax.runtime.reporting.tensorboard import EventLog, open_log, read_events

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="needs the extra tensorboard")


def crc32c(data: bytes) -> int:
  """CRC-32C (Castagnoli) bit by bit, with TensorFlow's mask; RFC 3720, appendix B.4."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  crc ^= 0xFFFFFFFF
  return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def entries(folder: pathlib.Path) -> list[tuple[str, int, Any]]:
  """Every entry of all files in order, without `read_events`."""
  found = []
  for path in sorted(folder.iterdir(), key=lambda path: int(path.suffix[1:])):
    data = path.read_bytes()
    while data:
      length, check = struct.unpack("<QI", data[:12])
      record, (end,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
      assert check == crc32c(data[:8])
      assert end == crc32c(record)
      data, event = data[16 + length :], event_pb2.Event.FromString(record)
      found += [(value.tag, event.step, value) for value in event.summary.value]
  return found


def test_everything_is_read_back(tmp_path: pathlib.Path) -> None:
  assert crc32c(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF
  image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
  with open_log(tmp_path / "new") as log:
    assert log is not None
    log.scalars(5, {"distillation/loss": 0.25})
    log.curves("synthesis", 10, {"loss": [1.0, 0.5], "jkl": [0.5, 0.125]}, learning_rate=lambda step: 0.5 - step / 4)
    log.text("run/protocol", "- **bits**: 4w4a")
    log.image("run/images", image)
  found = entries(tmp_path / "new")
  assert [(tag, step, value.simple_value) for tag, step, value in found if value.HasField("simple_value")] == [
    ("distillation/loss", 5, 0.25),
    ("synthesis/loss", 11, 1.0),
    ("synthesis/jkl", 11, 0.5),
    ("synthesis/learning_rate", 11, 0.5),
    ("synthesis/loss", 12, 0.5),
    ("synthesis/jkl", 12, 0.125),
    ("synthesis/learning_rate", 12, 0.25),
  ]
  (tag, _, text), (_, _, picture) = found[-2:]
  assert tag == "run/protocol/text_summary"
  assert text.metadata.plugin_data.plugin_name == "text"
  assert text.tensor.string_val[0] == b"- **bits**: 4w4a"
  assert (picture.image.height, picture.image.width, picture.image.colorspace) == (4, 6, 3)
  assert read_events(tmp_path / "new")["synthesis/jkl"] == {11: 0.5, 12: 0.125}
  with open_log(None) as log:
    assert log is None


def test_a_run_that_goes_on_repeats_no_step_and_fills_what_a_kill_cut_off(tmp_path: pathlib.Path) -> None:
  curve = [float(i) for i in range(10)]
  EventLog(tmp_path).curves("s", 0, {"loss": curve[:6]})  # killed: never closed, and yet on disk
  (path,) = tmp_path.iterdir()
  path.write_bytes(path.read_bytes()[:-3])  # the record of step 6 was not finished
  for end in (8, 10):
    log = EventLog(tmp_path)
    log.curves("s", 0, {"loss": curve[:end]})
    log.text("t", "same")
    log.close()
  assert len(list(tmp_path.iterdir())) == 3
  found = read_events(tmp_path)
  assert found["s/loss"] == {i + 1: value for i, value in enumerate(curve)}
  path.unlink()
  rest = [(tag, step) for tag, step, _ in entries(tmp_path)]
  assert rest == [*(("s/loss", i) for i in (6, 7, 8)), ("t/text_summary", 0), ("s/loss", 9), ("s/loss", 10)]


def test_what_cannot_be_written_or_read_is_one_sentence(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  (tmp_path / "file").write_text("")
  with pytest.raises(KwjaxError, match="cannot write the TensorBoard log"):
    EventLog(tmp_path / "file" / "log")
  (tmp_path / "events.out.tfevents.1").write_bytes(struct.pack("<QI", 3, 0) + b"\xff\xff\xff" + b"0000")
  with pytest.raises(KwjaxError, match=r"tfevents\.1 is damaged or not a TensorBoard log"):
    EventLog(tmp_path)

  monkeypatch.setitem(sys.modules, "tensorboardX.summary", None)
  with pytest.raises(KwjaxError, match=r'pip install "kwjax\[tensorboard\]"'):
    EventLog(tmp_path / "other")
