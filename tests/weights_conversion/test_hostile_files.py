"""Files that want more than to be read: nothing of them may run, and nothing but `WeightsError` may come out."""

from __future__ import annotations

import contextlib
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import (
  call,
  dict_of,
  named,
  program,
  save_state_dict,
  storage,
  tensor,
  text,
  tuple_of,
  write_legacy,
  write_zip,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kwjax.errors import WeightsError
from weights_conversion.pickle_globals import ALLOWED, Global, Inert
from weights_conversion.pickle_reader import load_pickle_bytes
from weights_conversion.tensors import TensorView
from weights_conversion.torch_import import load_torch_state_dict

VALUES = np.arange(24, dtype=np.float32)


def short_text(value: str) -> bytes:
  return b"\x8c" + bytes([len(value)]) + value.encode()


def attacks(command: str, code: str) -> dict[str, tuple[bytes, str]]:
  """Pickles that run `command` in a shell or evaluate `code` under Python's unpickler, and the name to be refused."""
  return {
    "GLOBAL os.system": (program(call(named("os", "system"), text(command))), "os.system"),
    "GLOBAL posix.system": (program(call(named("posix", "system"), text(command))), "posix.system"),
    "GLOBAL builtins.eval": (program(call(named("builtins", "eval"), text(code))), "builtins.eval"),
    "STACK_GLOBAL": (
      program(short_text("os") + short_text("system") + b"\x93" + tuple_of(text(command)) + b"R", 4),
      "os.system",
    ),
    "STACK_GLOBAL from memo": (
      program(
        short_text("os")
        + b"\x94"
        + short_text("system")
        + b"\x94"
        + b"00h\x00h\x01\x93"
        + tuple_of(text(command))
        + b"R",
        4,
      ),
      "os.system",
    ),
    "INST": (program(b"(" + text(command) + b"ios\nsystem\n"), "os.system"),
    "OBJ": (program(b"(" + named("os", "system") + text(command) + b"o"), "os.system"),
    "NEWOBJ": (
      program(named("subprocess", "Popen") + tuple_of(tuple_of(text("sh"), text("-c"), text(command))) + b"\x81"),
      "subprocess.Popen",
    ),
    "nested in a state dict": (
      program(dict_of({"state_dict": dict_of({"w": call(named("os", "system"), text(command))})})),
      "os.system",
    ),
    "reduce inside the arguments of a permitted call": (
      program(call(named("collections", "OrderedDict"), call(named("os", "system"), text(command)) + b"0]")),
      "os.system",
    ),
    "getattr by dotted name": (
      program(
        short_text("collections")
        + short_text("OrderedDict.__class__")
        + b"\x93"
        + b"0"
        + call(named("os", "system"), text(command)),
        4,
      ),
      "collections.OrderedDict.__class__",
    ),
    "BUILD": (
      program(
        named("types", "SimpleNamespace") + b")\x81" + dict_of({"x": call(named("os", "system"), text(command))}) + b"b"
      ),
      "types.SimpleNamespace",
    ),
  }


@pytest.mark.parametrize("container", ["bare", "zip", "legacy", "legacy magic"])
@pytest.mark.parametrize("name", attacks("", ""))
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, name, container):
  marker = tmp_path / "it_ran"
  payload, refused = attacks(f"touch {marker}", f"open({str(marker)!r}, 'w').close()")[name]
  path = tmp_path / "model.pth"
  if container == "zip":
    write_zip(path, payload, {})
  elif container == "legacy":
    write_legacy(path, payload, {})
  elif container == "legacy magic":
    path.write_bytes(payload)
  with pytest.raises(WeightsError, match="refused, nothing was run") as error:
    load_pickle_bytes(payload) if container == "bare" else load_torch_state_dict(path)
  assert refused in str(error.value)
  assert container == "bare" or "model.pth" in str(error.value)
  assert not marker.exists()
  # The same bytes do run under the standard unpickler, so the attack is a real one (Popen starts in __init__, which
  # NEWOBJ does not call: that one is refused for its name alone).
  pickle.loads(payload)
  assert marker.exists() == (name != "NEWOBJ")


def test_extension_registry_and_unknown_opcodes_are_refused():
  for body, opcode in ((b"\x82\x01", "EXT1"), (b"P1\n", "PERSID"), (b"\x97", "NEXT_BUFFER"), (b"\xff", "0xff")):
    with pytest.raises(WeightsError, match=opcode):
      load_pickle_bytes(program(body))


def test_permitted_names_give_inert_values_only():
  namespace = named("argparse", "Namespace") + b")\x81" + dict_of({"lr": b"K\x01"}) + b"b"
  scalar = call(named("numpy.core.multiarray", "scalar"), call(named("numpy", "dtype"), text("f8")), b"C\x01x")
  found = load_pickle_bytes(program(tuple_of(namespace, scalar), 3))
  assert [type(value).__name__ for value in found] == ["Inert", "Inert"]
  assert not [
    entry for entry in ALLOWED.values() if entry.build and not entry.build.__module__.startswith("weights_conversion")
  ]


def test_calling_what_may_only_be_mentioned_or_data_is_refused():
  for function in (named("torch", "FloatStorage"), named("torch", "float32"), text("os.system"), b"}"):
    with pytest.raises(WeightsError, match="its pickle calls"):
      load_pickle_bytes(program(call(function, text("x"))))


def test_a_deeply_nested_key_does_not_reach_the_hash_function():
  # Hashing this tuple with C recursion would overflow the stack and kill the process.
  deep = b")" + b"\x85" * 200_000
  with pytest.raises(WeightsError, match="tuple as a key"):
    load_pickle_bytes(program(b"}" + deep + b"K\x01s"))
  with pytest.raises(WeightsError, match="tuple as a key"):
    load_pickle_bytes(program(b"\x8f(" + deep + b"\x90", 4))


@pytest.mark.parametrize(
  "body",
  [
    b"B" + struct.pack("<I", 0xFFFFFFFF) + b"x",  # a string of 4 GiB
    b"\x8e" + struct.pack("<Q", 1 << 60) + b"x",  # of an exbibyte
    b"Nr" + struct.pack("<I", 0xFFFFFFFF),  # memo index 2^32 - 1: the standard unpickler allocates all below it
    b"\x8b" + struct.pack("<I", 1 << 31) + b"x",  # an integer of 2 GiB
    b"](" + b"N" * 50_000 + b"e" + b"q\x00" + (named("torch", "Size") + b"h\x00\x85R") * 1000,  # copies of one list
  ],
)
def test_claims_of_size_allocate_nothing(body):
  tracemalloc.start()
  with contextlib.suppress(WeightsError):
    load_pickle_bytes(program(body))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 100e6


def test_compressed_records_are_refused(tmp_path):
  path = tmp_path / "bomb.pth"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("a/data.pkl", program(dict_of({"w": tensor(storage("0", "f4", 1 << 22), (1 << 22,))})))
    archive.writestr("a/data/0", bytes(1 << 24))
  with pytest.raises(WeightsError, match=r"bomb\.pth.*compressed"):
    load_torch_state_dict(path)


def test_torchscript_is_refused(tmp_path):
  path = write_zip(tmp_path / "script.pt", program(b"}"), {})
  with zipfile.ZipFile(path, "a") as archive:
    archive.writestr("archive/constants.pkl", program(b")"))
  with pytest.raises(WeightsError, match="TorchScript"):
    load_torch_state_dict(path)


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("valid")
  arrays = {"conv.weight": VALUES.reshape(2, 3, 2, 2), "bn.num_batches_tracked": np.array(7), "bn.weight": VALUES[:2]}
  safetensors.numpy.save_file(arrays, folder / "w.safetensors")
  files = {
    "zip": save_state_dict(folder / "zip.pth", arrays),
    "legacy": save_state_dict(folder / "legacy.pth", arrays, legacy=True),
    "safetensors": folder / "w.safetensors",
  }
  return {kind: path.read_bytes() for kind, path in files.items()}


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations_raise_nothing_but_weights_error(valid_files, tmp_path, kind, data):
  content = bytearray(valid_files[kind])
  for _ in range(data.draw(st.integers(1, 6), "mutations")):
    place = data.draw(st.integers(0, max(len(content) - 1, 0)), "place")
    match data.draw(st.sampled_from(["set", "insert", "delete", "cut", "copy"]), "kind"):
      case "set":
        content[place : place + 1] = data.draw(st.binary(min_size=1, max_size=1))
      case "insert":
        content[place:place] = data.draw(st.binary(max_size=9))
      case "delete":
        del content[place : place + data.draw(st.integers(1, 9))]
      case "cut":
        del content[place:]
      case "copy":
        source = data.draw(st.integers(0, max(len(content) - 1, 0)))
        content[place : place + 8] = content[source : source + 8]
  path = tmp_path / "mutated"
  path.write_bytes(content)
  with contextlib.suppress(WeightsError):
    found = load_torch_state_dict(path)
    assert all(isinstance(name, str) and isinstance(value, np.ndarray) for name, value in found.items())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_random_pickles_raise_nothing_but_weights_error(body):
  with contextlib.suppress(WeightsError):
    found = load_pickle_bytes(b"\x80\x02" + body, lambda identifier: None)
    assert type(found) in (str, bytes, bool, int, float, type(None), dict, list, tuple, set, TensorView, Inert, Global)
