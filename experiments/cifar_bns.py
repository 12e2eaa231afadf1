"""The main job on a CIFAR-sized network: the same driver as `experiments.imagenet_bns`, at 32x32.

    python -m weights_conversion --arch resnet20 --source resnet20.th --out networks/resnet20
    python -m experiments.cifar_bns --network networks/resnet20 --eval-data cifar10.npz

synthesizes images from the network's BatchNorm statistics, calibrates 8w8a, 4w8a and 4w4a on them and on Gaussian images,
evaluates every quantized network on the labelled images, fine-tunes the last one and writes a report.
`--real-data FILE.npz:train` adds a column calibrated on real images, for comparison. `--preset paper` is Table 2 of
Haroush et al. (2020). `kwjax.compress` does the work.
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
  options = parse(Options, args, "python -m experiments.cifar_bns", __doc__)
  return run_command(lambda: run(options, name="cifar_bns", default=None))


if __name__ == "__main__":
  sys.exit(main())
