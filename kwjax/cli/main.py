"""The command `kwjax` and its subcommands; `kwjax.__main__` starts it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, Union

import tyro

from kwjax.cli import compress, convert, export, info, measure, options
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.runtime.devices.launch import relaunch_with_huge_pages

DEFAULT_ARCH = "efficientnet_lite0"

_ABOUT = """\
Compress a trained CNN without its training data.

First steps:
  kwjax compress                                                         the embedded network, minutes on two cores
  kwjax convert --arch resnet20 --source resnet20.th --out networks/resnet20
  kwjax compress --network networks/resnet20 --bits 4w4a --workdir runs/resnet20
  kwjax export --run runs/resnet20 --format onnx

Each command explains itself: kwjax compress --help. Versions and devices: kwjax --version."""

_COMPRESS = """\
Network in, quantized network and report out; no data needed.

  kwjax compress --network networks/resnet20 --bits 8w8a 4w4a --workdir runs/resnet20

Images are synthesized from the network's BatchNorm statistics. Every precision is calibrated on them. Those below 8
bits are reconstructed block by block for images up to 64 pixels. All are compared with the float network on held-out
images. The last precision is saved in WORKDIR/quantized, beside report.html, report.json and figures. The same command
goes on where it was stopped.
Without --network, --arch and --weights it takes the embedded EfficientNet-Lite0 (extra `demo`)."""

_CONVERT = """\
PyTorch or safetensors weights -> a folder that kwjax reads.

  kwjax convert --arch resnet18 --source torchvision --out networks/resnet18

PyTorch need not be installed, and no code from the file is ever run. --source is a .pth, .th, .pt, .pth.tar or
.safetensors file, a URL, `torchvision` (or `torchvision:V2`), or `demo`. More: python -m weights_conversion --help."""

_MEASURE = """\
How a network does on a set of images, as JSON.

  kwjax measure --network networks/resnet20 --data cifar10.npz:test

J_KL says how far the images are from what the network was trained on: lower is nearer. It needs BatchNorm and a float
network. With labels there is accuracy as well, for float and for quantized networks."""

_EXPORT = """\
A network -> an ONNX, StableHLO or safetensors file.

  kwjax export --run runs/resnet20 --format onnx

--run is the folder of `kwjax compress`; --network is a folder of a quantized network, or of a float one. The file is read
back and run, and its logits are compared with those of the network. Integer weights need a weight scheme with integer
levels, which is the default of `kwjax compress` (`--weight-scheme integer`)."""

_INFO = """\
Versions, devices and architectures; with --network, what is in its folder.

  kwjax info --network networks/resnet20"""


def _compress(chosen: options.Options) -> int:
  return compress.run(chosen, name="compress", default=DEFAULT_ARCH)


class Command(NamedTuple):
  """A subcommand.

  Attributes:
    options: its dataclass.
    summary: what it does, in a line.
    about: what `--help` says above the options.
    run: does it; returns the exit status.
  """

  options: type[Any]
  summary: str
  about: str
  run: Callable[[Any], int]


COMMANDS = {
  "convert": Command(convert.Options, "PyTorch or safetensors weights -> network folder", _CONVERT, convert.run),
  "compress": Command(options.Options, "network -> quantized network and report", _COMPRESS, _compress),
  "measure": Command(measure.Options, "J_KL and accuracy of a network on images", _MEASURE, measure.run),
  "export": Command(export.Options, "network -> ONNX, StableHLO or safetensors file", _EXPORT, export.export),
  "info": Command(info.Options, "versions, devices, architectures; or what a network folder holds", _INFO, info.run),
}


def main(args: Sequence[str] | None = None) -> int:
  """Read a command line and run it; returns the exit status.

  Args:
    args: the arguments, or None: those of the process, which is then started again with huge pages where that pays.
  """
  given = list(sys.argv[1:] if args is None else args) or ["--help"]
  if given[0] not in COMMANDS:
    # Shows the list, or says that there is no such command.
    listed = [Annotated[c.options, tyro.conf.subcommand(name, description=c.summary)] for name, c in COMMANDS.items()]
    parse(Union[tuple(listed)], given, "kwjax", _ABOUT)  # type: ignore[arg-type]  # noqa: UP007
  name, command = given[0], COMMANDS[given[0]]
  chosen = parse(command.options, given[1:], f"kwjax {name}", command.about)
  if args is None and name == "compress":
    relaunch_with_huge_pages()
  return run_command(lambda: command.run(chosen))
