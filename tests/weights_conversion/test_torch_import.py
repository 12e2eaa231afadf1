from __future__ import annotations

import struct

import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import (
  call,
  dict_of,
  integer,
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

from kwjax.errors import WeightsError
from weights_conversion.torch_import import load_torch_state_dict, read_weights

VALUES = np.arange(24, dtype=np.float32) / 7 - 1


@pytest.fixture(params=["zip", "legacy"])
def legacy(request):
  return request.param == "legacy"


def test_round_trip_of_hand_written_files(tmp_path, legacy):
  arrays = {"conv.weight": VALUES.reshape(2, 3, 2, 2), "bn.num_batches_tracked": np.array(7)}
  found = read_weights(save_state_dict(tmp_path / "w.pth", arrays, legacy=legacy))
  assert found.format == ("torch legacy" if legacy else "torch zip")
  assert list(found.arrays) == list(arrays)
  np.testing.assert_array_equal(found.arrays["conv.weight"], arrays["conv.weight"])
  np.testing.assert_array_equal(found.arrays["bn.num_batches_tracked"], np.array(7), strict=True)


def test_views_share_a_storage_and_may_be_strided(tmp_path, legacy):
  block = storage("0", "f4", 24, legacy=legacy)
  pickled = program(
    dict_of(
      {
        "tail": tensor(block, (4,), offset=20),
        "transposed": tensor(block, (4, 6), (1, 4)),
        "channels_last": tensor(block, (2, 3, 2, 2), (12, 1, 6, 3)),
        "expanded": tensor(block, (3, 2), (0, 1), offset=5),
        "scalar": tensor(block, (), offset=3),
        "empty": tensor(block, (0, 4)),
      }
    )
  )
  path = tmp_path / "views.pth"
  if legacy:
    write_legacy(path, pickled, {"0": (24, VALUES.tobytes())})
  else:
    write_zip(path, pickled, {"0": VALUES.tobytes()})
  found = load_torch_state_dict(path)
  np.testing.assert_array_equal(found["tail"], VALUES[20:])
  np.testing.assert_array_equal(found["transposed"], VALUES.reshape(6, 4).T)
  np.testing.assert_array_equal(found["channels_last"], VALUES.reshape(2, 2, 2, 3).transpose(0, 3, 1, 2))
  np.testing.assert_array_equal(found["expanded"], np.tile(VALUES[5:7], (3, 1)))
  np.testing.assert_array_equal(found["scalar"], VALUES[3].reshape(()), strict=True)
  assert found["empty"].shape == (0, 4)
  assert all(array.flags.c_contiguous and array.flags.writeable for array in found.values())


@pytest.mark.parametrize("order", ["little", "big"])
def test_byte_order_record(tmp_path, order):
  dtype = ">f4" if order == "big" else "<f4"
  pickled = program(dict_of({"w": tensor(storage("0", "f4", 24), (24,))}))
  path = write_zip(tmp_path / "w.pth", pickled, {"0": VALUES.astype(dtype).tobytes()}, order)
  np.testing.assert_array_equal(load_torch_state_dict(path)["w"], VALUES)


def test_bfloat16_becomes_float32(tmp_path):
  # 1.0, -2.5 and 3.140625 are exact in bfloat16: sign, 8 exponent and 7 fraction bits of the float32 pattern.
  bits = np.array([0x3F80, 0xC020, 0x4049], "<u2")
  pickled = program(dict_of({"w": tensor(storage("0", "bf16", 3), (3,))}))
  found = load_torch_state_dict(write_zip(tmp_path / "w.pth", pickled, {"0": bits.tobytes()}))["w"]
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, [1.0, -2.5, 3.140625])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_agrees_with_torch(tmp_path, protocol, zipped):
  torch = pytest.importorskip("torch")
  generator = torch.Generator().manual_seed(0)
  base = torch.randn(4, 6, 5, 3, generator=generator)
  state = {
    "channels_last": base.contiguous(memory_format=torch.channels_last),
    "slice": base[1:3, ::2, 1:, -1],
    "transposed": base.transpose(0, 3),
    "half": base.half(),
    "bfloat16": base.bfloat16(),
    "double": base.double(),
    "count": torch.tensor(12345),
    "flag": torch.tensor([True, False]),
    "parameter": torch.nn.Parameter(base[0]),
    "expanded": base[0, 0, 0, :1].expand(7),
    "empty": torch.zeros(0, 3),
  }
  path = tmp_path / "checkpoint.pth.tar"
  checkpoint = {
    "epoch": 3,
    "best_prec1": np.float64(93.5),
    "history": np.arange(3),
    "seen": {1, 2},
    "optimizer": {"state": {0: {"momentum_buffer": base}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
    "state_dict": {f"module.{name}": value for name, value in state.items()},
  }
  torch.save(checkpoint, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
  found = read_weights(path)
  assert (found.nested_under, found.prefix) == (("state_dict",), "module.")
  assert found.arrays.keys() == state.keys()
  for name, value in state.items():
    expected = value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
    np.testing.assert_array_equal(found.arrays[name], expected.numpy(), err_msg=name)
    assert found.arrays[name].dtype == expected.numpy().dtype


def test_state_dict_of_a_module_with_metadata_agrees_with_torch(tmp_path):
  torch = pytest.importorskip("torch")
  module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
  torch.save(module.state_dict(), tmp_path / "w.pth")
  found = load_torch_state_dict(tmp_path / "w.pth")
  assert found.keys() == module.state_dict().keys()
  for name, value in module.state_dict().items():
    np.testing.assert_array_equal(found[name], value.numpy())


def test_a_whole_pickled_module_is_refused_with_advice(tmp_path):
  torch = pytest.importorskip("torch")
  for zipped in (True, False):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"model\.pth.*torch\.nn\.modules\.linear\.Linear.*state_dict"):
      load_torch_state_dict(tmp_path / "model.pth")


def test_safetensors(tmp_path):
  path = tmp_path / "model.safetensors"
  for extra in range(20):  # headers of many lengths: their first byte may equal that of a pickle
    metadata = {"note": "x" * 8 * extra}
    safetensors.numpy.save_file({"module.a": VALUES.reshape(4, 6), "module.n": np.array(3)}, path, metadata)
    found = read_weights(path)
    assert (found.format, found.prefix) == ("safetensors", "module.")
  np.testing.assert_array_equal(found.arrays["a"], VALUES.reshape(4, 6))


def test_safetensors_bfloat16(tmp_path):
  torch = pytest.importorskip("torch")
  from safetensors.torch import save_file

  save_file({"w": torch.tensor([1.0, -2.5, 3.140625], dtype=torch.bfloat16)}, tmp_path / "w.safetensors")
  found = load_torch_state_dict(tmp_path / "w.safetensors")["w"]
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, [1.0, -2.5, 3.140625])


@pytest.mark.parametrize(
  ("path_of_keys", "prefix"),
  [
    ((), ""),
    (("state_dict",), "module."),
    (("model",), "_orig_mod."),
    (("net",), ""),
    (("model_state_dict",), "module._orig_mod."),
    (("ema",), "module."),
    (("model", "state_dict"), ""),
    (("whatever",), ""),
  ],
)
def test_nested_state_dicts_are_found(tmp_path, path_of_keys, prefix):
  body = dict_of({f"{prefix}conv.weight": tensor(storage("0", "f4", 24), (24,))})
  for key in reversed(path_of_keys):
    body = dict_of({"epoch": integer(9), "arch": text("resnet20"), key: body})
  found = read_weights(write_zip(tmp_path / "w.pth", program(body), {"0": VALUES.tobytes()}))
  assert (found.nested_under, found.prefix, list(found.arrays)) == (path_of_keys, prefix, ["conv.weight"])


def test_trained_weights_are_preferred_to_their_average_and_to_a_tensor_beside_them(tmp_path):
  block = storage("0", "f4", 24)
  body = {
    "best": tensor(block, ()),
    "ema": dict_of({"w": tensor(block, (1,), offset=1)}),
    "state_dict": dict_of({"w": tensor(block, (1,), offset=2)}),
  }
  found = read_weights(write_zip(tmp_path / "w.pth", program(dict_of(body)), {"0": VALUES.tobytes()}))
  assert found.nested_under == ("state_dict",)
  assert found.arrays["w"] == VALUES[2]


def test_several_unnamed_state_dicts_are_an_error(tmp_path):
  block = storage("0", "f4", 24)
  body = dict_of({name: dict_of({"w": tensor(block, (24,))}) for name in ("generator", "discriminator")})
  path = write_zip(tmp_path / "gan.pth", program(body), {"0": VALUES.tobytes()})
  with pytest.raises(WeightsError, match=r"gan\.pth.*'generator', 'discriminator'"):
    load_torch_state_dict(path)


def test_entries_that_are_no_tensors_are_named(tmp_path):
  body = dict_of({"w": tensor(storage("0", "f4", 24), (24,)), "extra": text("x")})
  path = write_zip(tmp_path / "w.pth", program(body), {"0": VALUES.tobytes()})
  with pytest.raises(WeightsError, match=r"w\.pth.*'extra' \(str\)"):
    load_torch_state_dict(path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "empty"),
    (b"<!DOCTYPE html><html><body>Please log in</body></html>", "web page"),
    (b"\n  <html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS"),
    (b"404: Not Found, there is nothing here at all", "text file.*404"),
    (b"\x1f\x8b\x08\x00" + bytes(64), "gzip"),
    (b"\x93NUMPY\x01\x00" + bytes(64), "93 4e 55 4d"),
    (bytes(257) + b"ustar" + bytes(250), "tar archive"),
    (b"\x80\x02K\x01.", "magic"),
    (b"\x80\x02", "cut off"),
    (b"PK\x03\x04" + bytes(100), "zip archive is cut off or damaged"),
    (struct.pack("<Q", 1 << 60) + b'{"a":1}' + bytes(8), "safetensors"),
  ],
)
def test_other_files_are_recognised(tmp_path, content, message):
  path = tmp_path / "weights.pth"
  path.write_bytes(content)
  with pytest.raises(WeightsError, match=rf"weights\.pth: .*{message}"):
    load_torch_state_dict(path)


def test_folder_and_missing_file(tmp_path):
  with pytest.raises(WeightsError, match=r"folder"):
    load_torch_state_dict(tmp_path)
  with pytest.raises(WeightsError, match=r"absent\.pth: no such file"):
    load_torch_state_dict(tmp_path / "absent.pth")


def test_every_truncation_is_an_error(tmp_path, legacy):
  whole = save_state_dict(tmp_path / "w.pth", {"w": VALUES, "v": VALUES[:5]}, legacy=legacy).read_bytes()
  path = tmp_path / "cut.pth"
  for length in range(len(whole)):
    path.write_bytes(whole[:length])
    with pytest.raises(WeightsError, match=r"cut\.pth"):
      load_torch_state_dict(path)


def test_a_flipped_byte_in_a_zip_is_noticed(tmp_path):
  path = save_state_dict(tmp_path / "w.pth", {"w": VALUES})
  data = bytearray(path.read_bytes())
  place = data.index(VALUES.tobytes())
  data[place + 10] ^= 1
  path.write_bytes(data)
  with pytest.raises(WeightsError, match=r"w\.pth.*damaged.*CRC"):
    load_torch_state_dict(path)


def test_a_storage_that_the_file_does_not_hold(tmp_path):
  pickled = program(dict_of({"w": tensor(storage("0", "f4", 1 << 50), (1 << 50,))}))
  with pytest.raises(WeightsError, match=r"memory"):
    load_torch_state_dict(write_zip(tmp_path / "w.pth", pickled, {"0": VALUES.tobytes()}))
  pickled = program(dict_of({"w": tensor(storage("0", "f4", 25), (24,))}))
  with pytest.raises(WeightsError, match=r"96 bytes, expected 100"):
    load_torch_state_dict(write_zip(tmp_path / "w.pth", pickled, {"0": VALUES.tobytes()}))
  pickled = program(dict_of({"w": tensor(storage("0", "f4", 1 << 50, legacy=True), (24,))}))
  with pytest.raises(WeightsError, match=r"cut off: storage 0 needs 4503599627370496 bytes"):
    load_torch_state_dict(write_legacy(tmp_path / "w.pth", pickled, {"0": (1 << 50, VALUES.tobytes())}))
  pickled = program(dict_of({"w": tensor(storage("0", "f4", 24), (1 << 48,), (0,))}))
  with pytest.raises(WeightsError, match=r"memory"):  # one stored element, expanded to a petabyte
    load_torch_state_dict(write_zip(tmp_path / "w.pth", pickled, {"0": VALUES.tobytes()}))


@pytest.mark.parametrize(
  ("size", "stride", "offset"),
  [
    ((25,), (1,), 0),
    ((24,), (1,), 1),
    ((2, 2), (24, 1), 0),
    ((2,), (-1,), 5),
    ((2,), (1,), -1),
    ((1,) * 17, (1,) * 17, 0),
  ],
)
def test_views_outside_their_storage(tmp_path, size, stride, offset):
  pickled = program(dict_of({"w": tensor(storage("0", "f4", 24), size, stride, offset)}))
  with pytest.raises(WeightsError, match=r"storage 0"):
    load_torch_state_dict(write_zip(tmp_path / "w.pth", pickled, {"0": VALUES.tobytes()}))


def test_missing_record_and_lazy_negation(tmp_path):
  block = storage("7", "f4", 24)
  pickled = program(dict_of({"w": tensor(block, (24,))}))
  with pytest.raises(WeightsError, match=r"archive/data/7"):
    load_torch_state_dict(write_zip(tmp_path / "w.pth", pickled, {"0": VALUES.tobytes()}))
  negated = call(
    named("torch._utils", "_rebuild_tensor_v2"),
    block, integer(0), tuple_of(integer(24)), tuple_of(integer(1)), b"\x89", b"}", dict_of({"neg": b"\x88"}),
  )  # fmt: skip
  with pytest.raises(WeightsError, match=r"negation"):
    load_torch_state_dict(write_zip(tmp_path / "w.pth", program(dict_of({"w": negated})), {"7": VALUES.tobytes()}))


def test_legacy_storage_list_and_lengths_are_checked(tmp_path):
  pickled = program(dict_of({"w": tensor(storage("0", "f4", 24, legacy=True), (24,))}))
  with pytest.raises(WeightsError, match=r"list of storages"):
    load_torch_state_dict(write_legacy(tmp_path / "w.pth", pickled, {"1": (24, VALUES.tobytes())}))
  with pytest.raises(WeightsError, match=r"storage 0 has 23 elements"):
    load_torch_state_dict(write_legacy(tmp_path / "w.pth", pickled, {"0": (23, VALUES.tobytes())}))


def test_real_files_read_as_torch_reads_them(shared_data):
  torch = pytest.importorskip("torch")
  path = shared_data / "weights" / "resnet20-12fca82f.th"
  expected = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
  found = read_weights(path)
  assert (found.format, found.prefix, found.nested_under) == ("torch legacy", "module.", ("state_dict",))
  assert {f"module.{name}" for name in found.arrays} == set(expected)
  for name, array in found.arrays.items():
    np.testing.assert_array_equal(array, expected[f"module.{name}"].numpy())
