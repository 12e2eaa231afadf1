"""The main job on an ImageNet network: from a trained checkpoint to a quantized network and a report, without data.

    python -m experiments.imagenet_bns

runs on the embedded default, EfficientNet-Lite0 with its real ImageNet weights (extra `demo`): it synthesizes images from
the network's BatchNorm statistics, calibrates 8w8a, 4w8a and 4w4a (first and last layer 8 bit) on them and on Gaussian
images beside them, says how often each quantized network agrees with the float network, fine-tunes the last one,
and writes `report.html`, `report.json`, figures and the quantized network into `runs/`. `kwjax.compress` does the work.

    python -m experiments.imagenet_bns --arch resnet18 --weights torchvision --eval-data val/ --preset paper

is the published protocol of Haroush et al. (2020), Table 3, on accelerators. `--dry-run` says what a command would cost.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments._harness.launch import relaunch_with_huge_pages

if __name__ == "__main__":
  relaunch_with_huge_pages()

from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.cli.compress import run
from kwjax.cli.options import Options


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the experiment; returns the exit status."""
  options = parse(Options, args, "python -m experiments.imagenet_bns", __doc__)
  return run_command(lambda: run(options, name="imagenet_bns", default="efficientnet_lite0"))


if __name__ == "__main__":
  sys.exit(main())
