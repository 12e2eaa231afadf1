"""A pickle interpreter that can build dicts, lists and tensor descriptions, and cannot call anything else.

Python's own `pickle.Unpickler` with a restricted `find_class` still grows its memo to whatever index a file names and
allocates whatever length it claims. Here every opcode that PyTorch writes (protocols 2 to 5) is interpreted on plain
data, with bounds, and all others are refused by name.
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from kwjax.errors import WeightsError
from weights_conversion.pickle_globals import Global, Inert, Stateful, find_global, scalar_key
from weights_conversion.tensors import TensorView

MAX_PICKLE_BYTES = 1 << 26
MAX_OPERATIONS = 1 << 22
_MARK = object()
_OPCODE_NAMES = {ord(op.code): op.name for op in pickletools.opcodes}
_CONSTANTS: dict[int, Any] = {ord("N"): None, 0x88: True, 0x89: False, ord(")"): ()}
_EMPTY: dict[int, Callable[[], Any]] = {ord("}"): dict, ord("]"): list, 0x8F: set}
_NUMBERS = {ord("J"): "<i", ord("K"): "<B", ord("M"): "<H", ord("G"): ">d"}
# Opcode -> (struct of the length that follows, how to decode the bytes after it).
_STRINGS: dict[int, tuple[str, str]] = {
  ord("X"): ("<I", "utf-8"),
  0x8C: ("<B", "utf-8"),
  0x8D: ("<Q", "utf-8"),
  ord("U"): ("<B", "latin-1"),  # Python 2 str: keys are ASCII; latin-1 never fails
  ord("T"): ("<I", "latin-1"),
  ord("B"): ("<I", ""),
  ord("C"): ("<B", ""),
  0x8E: ("<Q", ""),
  0x96: ("<Q", ""),
}
_FIXED_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}


def load_pickle(
  stream: BinaryIO,
  persistent_load: Callable[[Any], Any] | None = None,
  *,
  names: Callable[[str, str], Global] = find_global,
  max_bytes: int = MAX_PICKLE_BYTES,
) -> Any:
  """Interpret one pickle from `stream` and leave the stream right after its STOP opcode.

  Args:
    stream: positioned at the pickle.
    persistent_load: turns a persistent id (a tuple) into data; without it persistent ids are refused.
    names: the stand-in of `module.name`, or a WeightsError; by default those of a state dict.
    max_bytes: a longer pickle is refused.

  Returns: str, bytes, numbers, None, dict, list, tuple, set, `TensorView`, `Inert` and `Global`, nested.

  Raises:
    WeightsError: the pickle is malformed, cut off, larger than the limits, or asks for a name outside the table.
  """
  return _Machine(stream, persistent_load, names, max_bytes).run()


class _Machine:
  """One run of the interpreter: wraps the stream, the value stack and the memo."""

  def __init__(
    self,
    stream: BinaryIO,
    persistent_load: Callable[[Any], Any] | None,
    names: Callable[[str, str], Global],
    max_bytes: int,
  ) -> None:
    self.stream = stream
    self.persistent_load = persistent_load
    self.names = names
    self.max_bytes = max_bytes
    self.stack: list[Any] = []
    self.memo: dict[int, Any] = {}
    self.left = max_bytes
    self.operations = 0

  def run(self) -> Any:
    while True:
      code = self.read(1)[0]
      if code == ord("."):
        return self.pop()
      self.spend(1)
      self.step(code)

  def spend(self, operations: int) -> None:
    self.operations += operations
    if self.operations > MAX_OPERATIONS:
      raise WeightsError(f"its pickle takes more than {MAX_OPERATIONS} operations")

  def read(self, count: int) -> bytes:
    if count > self.left:
      raise WeightsError(f"its pickle is longer than {self.max_bytes} bytes")
    data = self.stream.read(count)
    if len(data) < count:
      raise WeightsError("its pickle is cut off")
    self.left -= count
    return data

  def unpack(self, layout: str) -> Any:
    return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]

  def line(self) -> str:
    data = self.stream.readline(256)
    self.left -= len(data)
    if not data.endswith(b"\n"):
      raise WeightsError("its pickle is cut off or names something of more than 255 characters")
    return data[:-1].decode("utf-8", "backslashreplace")

  def pop(self) -> Any:
    if not self.stack or self.stack[-1] is _MARK:
      raise WeightsError("its pickle is malformed: it takes a value from an empty stack")
    return self.stack.pop()

  def pop_to_mark(self) -> list[Any]:
    for index in range(len(self.stack) - 1, -1, -1):
      if self.stack[index] is _MARK:
        items = self.stack[index + 1 :]
        del self.stack[index:]
        return items
    raise WeightsError("its pickle is malformed: a MARK is missing")

  def top(self, *kinds: type) -> Any:
    if not self.stack or not isinstance(self.stack[-1], kinds):
      wanted = " or ".join(kind.__name__ for kind in kinds)
      found = type(self.stack[-1]).__name__ if self.stack else "an empty stack"
      raise WeightsError(f"its pickle is malformed: it needs a {wanted}, found {found}")
    return self.stack[-1]

  def step(self, code: int) -> None:
    """Carry out one opcode."""
    if code in _CONSTANTS:
      self.stack.append(_CONSTANTS[code])
    elif code in _EMPTY:
      self.stack.append(_EMPTY[code]())
    elif code in _NUMBERS:
      self.stack.append(self.unpack(_NUMBERS[code]))
    elif code in _STRINGS:
      layout, encoding = _STRINGS[code]
      data = self.read(self.unpack(layout))
      self.stack.append(data.decode(encoding, "backslashreplace") if encoding else data)
    elif code in _FIXED_TUPLES:
      items = [self.pop() for _ in range(_FIXED_TUPLES[code])]
      self.stack.append(tuple(reversed(items)))
    elif code in _HANDLERS:
      _HANDLERS[code](self)
    else:
      raise WeightsError(f"refused, nothing was run: its pickle uses the opcode {_OPCODE_NAMES.get(code, hex(code))}")

  def get_memo(self, index: int) -> None:
    if index not in self.memo:
      raise WeightsError("its pickle is malformed: it recalls a value that was never stored")
    self.stack.append(self.memo[index])

  def put_memo(self, index: int) -> None:
    self.memo[index] = self.top(object)

  def set_items(self, items: list[Any]) -> None:
    target = self.top(dict)
    if len(items) % 2:
      raise WeightsError("its pickle is malformed: a dict has a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
      target[scalar_key(key, "dict")] = value

  def set_item(self) -> None:
    value, key = self.pop(), self.pop()
    self.set_items([key, value])

  def append(self) -> None:
    item = self.pop()
    self.top(list).append(item)

  def extend(self) -> None:
    items = self.pop_to_mark()
    self.top(list).extend(items)

  def add_items(self) -> None:
    items = self.pop_to_mark()
    self.top(set).update(scalar_key(item, "set") for item in items)

  def push_dict(self) -> None:
    items = self.pop_to_mark()
    self.stack.append({})
    self.set_items(items)

  def push_global(self) -> None:
    self.stack.append(self.names(self.line(), self.line()))

  def stack_global(self) -> None:
    name, module = self.pop(), self.pop()
    if not isinstance(name, str) or not isinstance(module, str):
      raise WeightsError("its pickle is malformed: it asks for a name that is no text")
    self.stack.append(self.names(module, name))

  def instantiate(self) -> None:
    self.names(self.line(), self.line())
    raise WeightsError("refused, nothing was run: its pickle uses the opcode INST")

  def call(self) -> None:
    args, function = self.pop(), self.pop()
    if not isinstance(function, Global) or function.build is None or not isinstance(args, tuple):
      shown = function.name if isinstance(function, Global) else type(function).__name__
      raise WeightsError(f"refused, nothing was run: its pickle calls {shown}")
    # A few bytes of pickle can ask again and again for a copy of one long list.
    self.spend(sum(len(arg) for arg in args if isinstance(arg, list | tuple | dict)))
    self.stack.append(function.build(args))

  def call_with_keywords(self) -> None:
    if self.pop() != {}:
      raise WeightsError("refused, nothing was run: its pickle builds an object with keyword arguments")
    self.call()

  def build(self) -> None:
    # State of an OrderedDict (its _metadata), of a Parameter or of something inert: none of it is a weight.
    state = self.pop()
    target = self.top(dict, Inert, TensorView)
    if isinstance(target, Stateful):
      target.states.append(state)

  def persistent_id(self) -> None:
    identifier = self.pop()
    if self.persistent_load is None:
      raise WeightsError("its pickle refers to a storage where none can be")
    self.stack.append(self.persistent_load(identifier))

  def integer(self, layout: str) -> None:
    data = self.read(self.unpack(layout))
    if len(data) > 16:
      raise WeightsError(f"its pickle holds an integer of {len(data)} bytes")
    self.stack.append(int.from_bytes(data, "little", signed=True))


_HANDLERS: dict[int, Callable[[_Machine], None]] = {
  0x80: lambda m: _check_protocol(m.read(1)[0]),
  0x95: lambda m: _ignore(m.read(8)),  # FRAME is a reading hint
  ord("("): lambda m: m.stack.append(_MARK),
  ord("0"): lambda m: _ignore(m.pop()),
  ord("1"): lambda m: _ignore(m.pop_to_mark()),
  ord("2"): lambda m: m.stack.append(m.top(object)),
  ord("h"): lambda m: m.get_memo(m.unpack("<B")),
  ord("j"): lambda m: m.get_memo(m.unpack("<I")),
  ord("q"): lambda m: m.put_memo(m.unpack("<B")),
  ord("r"): lambda m: m.put_memo(m.unpack("<I")),
  0x94: lambda m: m.put_memo(len(m.memo)),
  ord("t"): lambda m: m.stack.append(tuple(m.pop_to_mark())),
  ord("l"): lambda m: m.stack.append(m.pop_to_mark()),
  ord("d"): _Machine.push_dict,
  ord("s"): _Machine.set_item,
  ord("u"): lambda m: m.set_items(m.pop_to_mark()),
  ord("a"): _Machine.append,
  ord("e"): _Machine.extend,
  0x90: _Machine.add_items,
  ord("c"): _Machine.push_global,
  0x93: _Machine.stack_global,
  ord("i"): _Machine.instantiate,
  ord("R"): _Machine.call,
  0x81: _Machine.call,
  0x92: _Machine.call_with_keywords,
  ord("b"): _Machine.build,
  ord("Q"): _Machine.persistent_id,
  0x8A: lambda m: m.integer("<B"),
  0x8B: lambda m: m.integer("<I"),
}


def _check_protocol(protocol: int) -> None:
  if protocol > 5:
    raise WeightsError(f"its pickle has protocol {protocol}, the highest known one is 5")


def _ignore(_: object) -> None:
  """Drop a value."""


def load_pickle_bytes(data: bytes, persistent_load: Callable[[Any], Any] | None = None) -> Any:
  """`load_pickle` of a pickle in memory."""
  return load_pickle(io.BytesIO(data), persistent_load)
