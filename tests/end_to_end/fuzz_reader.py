"""Files that are almost right, for the readers of weights: `python -m tests.end_to_end.fuzz_reader --minutes 10`.

Whatever is in a file, `load_torch_state_dict` and `load_network` either read it or raise a `KwjaxError`; they run no code of
it, take no more memory than a multiple of its size, and come to an end.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import pathlib
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from types import FrameType

import numpy as np
import safetensors.numpy

from kwjax.errors import KwjaxError
from kwjax.network import load_network, save_network
from kwjax.network_files import DESCRIPTION_FILE, WEIGHTS_FILE
from tests.end_to_end import jobs
from tests.weights_conversion import checkpoint_files as written
from weights_conversion.pickle_globals import ALLOWED
from weights_conversion.torch_import import load_torch_state_dict

MARKER = "it_ran"
MEMORY_BYTES = 1 << 30
"""Of address space that the long run may take beyond what it starts with."""
SECONDS = 30
"""Longer than any file of these sizes may take."""

_SIZES = (
  0,
  1,
  2,
  3,
  7,
  8,
  127,
  128,
  255,
  256,
  0x7FFF,
  0xFFFF,
  0x7FFFFFFF,
  0xFFFFFFFF,
  1 << 40,
  (1 << 63) - 1,
  (1 << 64) - 1,
)


def valid_files(folder: pathlib.Path) -> dict[str, bytes]:
  """One good file of every format, and the two files of a stored network."""
  values = np.arange(24, dtype=np.float32)
  arrays = {"conv.weight": values.reshape(2, 3, 2, 2), "bn.num_batches_tracked": np.array(7), "bn.weight": values[:2]}
  save_network(jobs.tiny_network(), folder)
  description = json.loads((folder / DESCRIPTION_FILE).read_bytes())
  # Without its checksums every change would be found at once, and nothing behind them would be tried.
  del description["sha256"], description["weights_sha256"]
  return {
    "zip": written.save_state_dict(folder / "zip.pth", arrays).read_bytes(),
    "legacy": written.save_state_dict(folder / "legacy.pth", arrays, legacy=True).read_bytes(),
    "safetensors": safetensors.numpy.save(arrays),
    "weights": (folder / WEIGHTS_FILE).read_bytes(),
    "description": json.dumps(description).encode(),
  }


def mutate(moments: random.Random, content: bytes, others: list[bytes]) -> bytes:
  """One to six changes: bytes set, put in, taken out, moved, cut off, spliced from another file, sizes made extreme."""
  data = bytearray(content)
  for _ in range(moments.randint(1, 6)):
    place = moments.randint(0, max(len(data) - 1, 0))
    match moments.randrange(10):
      case 0:
        data[place : place + 1] = bytes([moments.randrange(256)])
      case 1 if data:
        data[place] ^= 1 << moments.randrange(8)
      case 2:
        data[place:place] = moments.randbytes(moments.randint(1, 9))
      case 3:
        del data[place : place + moments.randint(1, 40)]
      case 4:
        del data[place:]
      case 5:
        source = moments.randint(0, max(len(data) - 1, 0))
        data[place : place + 16] = data[source : source + moments.randint(1, 64)]
      case 6:
        other = moments.choice(others)
        source = moments.randint(0, max(len(other) - 1, 0))
        data[place:place] = other[source : source + moments.randint(1, 300)]
      case 7:
        width = moments.choice("BHIQ")
        size = moments.choice(_SIZES) & ((1 << (8 * struct.calcsize(width))) - 1)
        data[place : place + struct.calcsize(width)] = struct.pack(f"<{width}", size)
      case 8:
        _change_zip_field(moments, data)
      case 9:
        _change_number(moments, data)
  return bytes(data)


def _change_zip_field(moments: random.Random, data: bytearray) -> None:
  """Overwrites a field of a local header, of a central entry or of the end of the archive."""
  kinds = {b"PK\x03\x04": 30, b"PK\x01\x02": 46, b"PK\x05\x06": 22}
  starts = [(place, size) for sign, size in kinds.items() for place in _places(data, sign)]
  if starts:
    place, size = moments.choice(starts)
    field = place + moments.randrange(4, size - 3)
    data[field : field + 4] = struct.pack("<I", moments.choice(_SIZES) & 0xFFFFFFFF)


def _places(data: bytearray, sign: bytes) -> list[int]:
  found, place = [], data.find(sign)
  while place >= 0:
    found.append(place)
    place = data.find(sign, place + 1)
  return found


def _change_number(moments: random.Random, data: bytearray) -> None:
  """Replaces a run of digits, as they are in the headers of safetensors and in JSON."""
  digits = [place for place, byte in enumerate(data[:4000]) if chr(byte).isdigit() and byte < 128]
  if digits:
    start = moments.choice(digits)
    stop = start
    while stop < len(data) and 48 <= data[stop] < 58:
      stop += 1
    text = moments.choice([str(moments.choice(_SIZES)), "-1", "1e999", '"x"', "null", "[1]", "9" * 5000, "[" * 2000])
    data[start:stop] = text.encode()


def pickle_program(moments: random.Random, marker: pathlib.Path) -> bytes:
  """A random walk over opcodes: most of it such as PyTorch writes, some that would run a shell under Python's unpickler."""
  command = written.text(f"touch {marker}")
  shell = written.call(written.named("os", "system"), command)

  def size() -> bytes:
    return written.integer(min(moments.choice(_SIZES), (1 << 63) - 1))

  def permitted() -> bytes:
    return written.named(*moments.choice(list(ALLOWED)).rsplit(".", 1))

  def block() -> bytes:
    kind = moments.choice(list(written.STORAGES))
    return written.storage(moments.choice("01x"), kind, moments.choice((0, 1, 24, 1 << 40)))

  def view() -> bytes:
    rank = moments.randint(0, 4)
    shape, stride = ([moments.choice((0, 1, 2, 3, 1 << 20, 1 << 40)) for _ in range(rank)] for _ in range(2))
    return written.tensor(block(), shape, stride if moments.random() < 0.7 else None, moments.choice((0, 1, 1 << 50)))

  def sound() -> bytes:
    shape = moments.choice([(24,), (2, 3, 4), (0, 5), (), (1,) * 5])
    strides = moments.choice([None, None, (0,) * len(shape)])
    return written.tensor(written.storage("0", "f4", 24), shape, strides)

  makers: list[Callable[[], bytes]] = [
    lambda: moments.choice([b"N", b"\x88", b")", b"}", b"]", b"\x8f", b"(", b"0", b"1", b"2", b"a", b"e", b"s", b"u"]),
    lambda: moments.choice(
      [b"t", b"l", b"d", b"b", b"Q", b"R", b"\x81", b"\x92", b"\x93", b"\x94", b"\x90", b"\x85", b"\x87"]
    ),
    lambda: moments.choice([b"q", b"h"]) + bytes([moments.randrange(4)]),
    lambda: moments.choice([b"r", b"j"]) + struct.pack("<I", moments.choice(_SIZES) & 0xFFFFFFFF),
    lambda: moments.choice([b"X", b"T", b"B"]) + struct.pack("<I", moments.choice(_SIZES) & 0xFFFFFFFF) + b"abc",
    lambda: moments.choice([b"\x8d", b"\x8e", b"\x96"]) + struct.pack("<Q", moments.choice(_SIZES)) + b"abc",
    lambda: moments.choice([b"\x8a", b"\x8c", b"U", b"C"]) + bytes([moments.randrange(6)]) + b"conv.",
    lambda: written.text(moments.choice(["state_dict", "model", "conv.weight", "module.a", "x" * 300, "\x1b[2J"])),
    size,
    permitted,
    block,
    view,
    lambda: written.text(f"w{moments.randrange(9)}") + view() + b"s",
    lambda: written.call(permitted(), *(moments.choice([size, view, block])() for _ in range(moments.randrange(4)))),
    lambda: written.call(permitted(), written.tuple_of(*(view() for _ in range(moments.randrange(3))))),
    lambda: shell,
    lambda: written.named("builtins", "eval") + command + b"\x85R",
    lambda: b"\x8c\x02os\x8c\x06system\x93" + command + b"\x85R",
    lambda: b"}" + moments.choice([b"]", b"}", b")", b"\x8f"]) + b"Ns",
    lambda: moments.randbytes(3),
  ]
  parts = [moments.choice(makers)() for _ in range(moments.randint(1, 12))]
  if moments.random() < 0.7:
    # A state dict, with something strange between its entries or not.
    entries = [written.text(f"w{i}") + (sound() if moments.random() < 0.8 else view()) + b"s" for i in range(3)]
    parts = [b"}", *entries, *(parts[:1] if moments.random() < 0.6 else [])]
  return written.program(b"".join(parts), moments.choice((2, 2, 2, 4, 5)))


def example(moments: random.Random, valid: dict[str, bytes], folder: pathlib.Path) -> str:
  """Makes one file in `folder` and reads it; says what came of it.

  Raises:
    Exception: whatever a reader raised that is no `KwjaxError`.
  """
  kind = moments.choice([*valid, "pickle in a zip", "bare pickle", "legacy pickle"])
  marker = folder / MARKER
  if kind in valid:
    content = mutate(moments, valid[kind], list(valid.values()))
    if kind == "description" and moments.random() < 0.7:
      content = change_value(moments, valid[kind])
  else:
    program = pickle_program(moments, marker)
    path = folder / "program.pth"
    content = program
    if kind == "pickle in a zip":
      content = written.write_zip(path, program, {"0": bytes(96), "1": bytes(8)}).read_bytes()
    elif kind == "legacy pickle":
      storages = {"0": (24, bytes(96)), **({"1": (2, bytes(8))} if moments.random() < 0.3 else {})}
      content = written.write_legacy(path, program, storages).read_bytes()
  try:
    if kind in ("weights", "description"):
      _store(folder, kind, content, valid)
      load_network(folder)
    else:
      (folder / "file.pth").write_bytes(content)
      arrays = load_torch_state_dict(folder / "file.pth")
      assert all(isinstance(name, str) and isinstance(value, np.ndarray) for name, value in arrays.items())
  except KwjaxError as error:
    message = str(error)
  else:
    message = ""
  finally:
    assert not marker.exists(), f"code of a file was run ({kind})"
  assert len(message) < 20_000 + 10 * len(content), "the message is longer than what it is about"
  return f"{kind}: {'refused' if message else 'read'}"


def change_value(moments: random.Random, content: bytes) -> bytes:
  """JSON with one value, at some depth, replaced by one of another kind or size."""
  description = json.loads(content)
  name = moments.choice(list(description))
  values = [None, True, -1, 0, 3, 1 << 70, 0.5, float("nan"), float("inf"), "x", [], {}, [1, 2], {"name": 1}, [0] * 3]
  values += [[8, 8, 1 << 40], [8, 8, 3, 3], "wrn16_1", "resnet20", {"blocks_per_stage": moments.choice(values)}]
  values += [{"num_classes": moments.choice(values), "blocks_per_stage": 0}, {"train": "yes"}, {"rngs": 1}, {"x": None}]
  value = description[name]
  if isinstance(value, (list, dict)) and value and moments.random() < 0.5:
    value[moments.choice(list(value)) if isinstance(value, dict) else 0] = moments.choice(values)
  else:
    description[name] = moments.choice(values)
  return json.dumps(description).encode()


def _store(folder: pathlib.Path, kind: str, content: bytes, valid: dict[str, bytes]) -> None:
  (folder / WEIGHTS_FILE).write_bytes(content if kind == "weights" else valid["weights"])
  description = content if kind == "description" else valid["description"]
  if kind == "weights" and hashlib.sha256(content).digest()[0] < 16:
    # Now and then with the checksum that the sound file had, which must then be what is complained about.
    stated = {**json.loads(description), "weights_sha256": hashlib.sha256(valid["weights"]).hexdigest()}
    description = json.dumps(stated).encode()
  (folder / DESCRIPTION_FILE).write_bytes(description)


def _too_long(number: int, frame: FrameType | None) -> None:
  raise TimeoutError(f"a reader took more than {SECONDS} s")


def main() -> int:
  """The long run; returns 1 if a file was found that does what none may do, and keeps it."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--minutes", type=float, default=10.0)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--keep", type=pathlib.Path, default=pathlib.Path("fuzz_findings"), metavar="FOLDER")
  args = parser.parse_args()
  counts: collections.Counter[str] = collections.Counter()
  findings: dict[str, int] = {}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    valid = valid_files(folder)
    load_network(folder)  # what JAX takes at its first call is not the files' doing
    taken = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGALRM, _too_long)
    start, number = time.monotonic(), 0
    while time.monotonic() - start < 60 * args.minutes:
      signal.alarm(SECONDS)
      try:
        counts[example(random.Random(f"{args.seed}-{number}"), valid, folder)] += 1
      # The whole point is that nothing but a KwjaxError, which `example` takes, comes out.
      except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__} at {pathlib.Path(place.filename).name}:{place.lineno}: {str(error)[:100]}"
        if what not in findings and len(findings) < 100:
          args.keep.mkdir(parents=True, exist_ok=True)
          (args.keep / f"{args.seed}-{number}.txt").write_text(traceback.format_exc())
        findings.setdefault(what, number)
      finally:
        signal.alarm(0)
      number += 1
  seconds = time.monotonic() - start
  print(f"{number} files in {seconds:.0f} s ({number / seconds:.0f} a second), {len(findings)} kinds of failure")
  for what, count in sorted(counts.items()):
    print(f"  {count:8d} {what}")
  for what, first in findings.items():
    print(f"  example {args.seed}-{first}: {what}")
  return 1 if findings else 0


if __name__ == "__main__":
  sys.exit(main())
