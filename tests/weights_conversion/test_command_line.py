from __future__ import annotations

import json

import numpy as np
import pytest
from checkpoint_files import call, named, program, save_state_dict, text, write_zip
from reference_networks import seeded_state_dict

import weights_conversion.__main__ as command
from kwjax.network import load_network
from weights_conversion.mapping import LEAVES, flax_entries
from weights_conversion.naming import dotted


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  names = {f"{dotted(e.module)}.{LEAVES[e.path[0], e.path[-1]]}": e.torch_shape for e in flax_entries("resnet20")}
  return save_state_dict(tmp_path_factory.mktemp("weights") / "resnet20.pth", seeded_state_dict(names))


def run(*arguments: object) -> int:
  return command.main([str(argument) for argument in arguments])


def test_writes_a_folder_that_load_network_reads(checkpoint, tmp_path, capsys):
  out = tmp_path / "networks" / "resnet20"
  assert run("--arch", "resnet20", "--source", checkpoint, "--out", out) == 0
  printed = capsys.readouterr()
  assert printed.err == ""
  assert printed.out.count("\n") == 1
  assert "10 classes, images 32x32x3, 97 arrays from resnet20.pth (torch zip, original names" in printed.out
  assert sorted(path.name for path in out.parent.iterdir()) == ["resnet20"]
  description = json.loads((out / "network.json").read_text())
  assert description["arch"] == "resnet20"
  assert description["input_mean"] == [0.485, 0.456, 0.406]
  assert len(description["source"]["sha256"]) == 64
  network = load_network(out)
  logits = network.apply(np.full((1, 32, 32, 3), 0.5, np.float32))
  assert logits.shape == (1, 10)


def test_options_reach_the_network(checkpoint, tmp_path):
  out = tmp_path / "n"
  options = ("--input-mean", 0.1, 0.2, 0.3, "--input-std", 0.4, 0.5, 0.6, "--image-size", 48, "--num-classes", 10)
  assert run("--arch", "resnet20", "--source", checkpoint, "--out", out, "--quiet", *options) == 0
  network = load_network(out)
  assert (network.input_mean, network.input_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
  assert network.image_shape == (48, 48, 3)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (("--arch", "resnet"), "unknown model 'resnet'"),
    (("--source", "absent.pth"), "absent.pth: no such file"),
    (("--num-classes", "100"), "100 were asked for"),
    (("--arch", "resnet44"), "120 missing: layer1.3.bn1.bias (16,); "),
    (("--source", "torchvision"), "torchvision publishes no weights for resnet20"),
    (("--source", "demo"), "efficientnet_lite0"),
  ],
)
def test_errors_are_one_line_and_leave_nothing(checkpoint, tmp_path, capsys, options, message):
  out = tmp_path / "new" / "folder"
  assert run("--arch", "resnet20", "--source", checkpoint, "--out", out, *options) == 2
  printed = capsys.readouterr()
  assert printed.out == ""
  assert printed.err.startswith("error: ")
  assert printed.err.count("\n") == 1
  assert message in printed.err
  assert not out.parent.exists()


def test_a_hostile_file_is_refused(tmp_path, capsys):
  marker = tmp_path / "it_ran"
  path = write_zip(tmp_path / "evil.pth", program(call(named("os", "system"), text(f"touch {marker}"))), {})
  assert run("--arch", "resnet20", "--source", path, "--out", tmp_path / "out") == 2
  assert "evil.pth: refused, nothing was run: its pickle asks for 'os.system'" in capsys.readouterr().err
  assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pth"]


def test_an_existing_folder_is_replaced_only_on_request(checkpoint, tmp_path, capsys):
  out = tmp_path / "n"
  arguments = ("--arch", "resnet20", "--source", checkpoint, "--out", out, "--quiet")
  out.mkdir()
  assert run(*arguments) == 0  # empty: fine
  assert run(*arguments) == 2
  assert "--overwrite" in capsys.readouterr().err
  (out / "old").write_text("")
  assert run(*arguments, "--overwrite") == 0
  assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "network.json"]
  assert [path.name for path in tmp_path.iterdir()] == ["n"]
  other = tmp_path / "precious"
  other.mkdir()
  (other / "thesis.txt").write_text("")
  assert run(*arguments[:-2], other, "--overwrite") == 2
  assert "holds no network" in capsys.readouterr().err
  assert [path.name for path in other.iterdir()] == ["thesis.txt"]
  assert run(*arguments[:-2], other / "thesis.txt") == 2
  assert "is a file" in capsys.readouterr().err


def test_a_failed_write_keeps_the_old_network(checkpoint, tmp_path, monkeypatch, capsys):
  out = tmp_path / "n"
  arguments = ("--arch", "resnet20", "--source", checkpoint, "--out", out, "--quiet")
  assert run(*arguments) == 0
  before = (out / "model.safetensors").read_bytes()
  rename, calls = command.os.rename, []

  def failing(source, target):
    calls.append(target)
    if len(calls) == 2:
      raise OSError(28, "No space left on device")
    rename(source, target)

  monkeypatch.setattr(command.os, "rename", failing)
  assert run(*arguments, "--overwrite") == 2
  assert "No space left on device" in capsys.readouterr().err
  assert (out / "model.safetensors").read_bytes() == before
  assert [path.name for path in tmp_path.iterdir()] == ["n"]


def test_wrong_command_lines_exit_with_2_in_one_line(capsys):
  for arguments in ((), ("--arch", "resnet20", "--source", "x", "--out", "y", "--num-classes", "many")):
    with pytest.raises(SystemExit) as stop:
      command.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_teaches(capsys):
  with pytest.raises(SystemExit) as stop:
    command.main(["--help"])
  assert stop.value.code == 0
  printed = capsys.readouterr().out
  for word in ("--source torchvision", "--source demo", "load_network", "$KWJAX_CACHE", "exit status"):
    assert word in printed
