"""Table 2 of Haroush et al. (2020): calibration and distillation by data source, ResNet-44/CIFAR-10 or WRN-28-10/CIFAR-100.

    python -m weights_conversion --arch resnet44 --source resnet44.th --out networks/resnet44
    python -m experiments.knowledge_within.table2_cifar --network networks/resnet44 \
        --eval-data cifar10.npz:test --real-data cifar10.npz:train --seeds 0 1 2 --images 128
    python -m experiments.knowledge_within.table2_cifar --network networks/wrn28_10 \
        --eval-data tfds:cifar100:test --real-data tfds:cifar100:train --preset paper

Rows: real training images (`real`, a comparison; left out without --real-data), images made from BatchNorm statistics (`bns`),
by class (`inception`), by both (`bns+inception`), and Gaussian noise (`gaussian`). Columns: top-1 after calibration, and
after distillation (`KD-`); `*`: first and last layer 8 bit, `**`: first and last layer 4 bit, else all layers alike.
The KD columns are long: at `--preset cpu` they are measured when they are named (`--columns KD-4w4a`), always at
`--preset paper`.
The table can be filled over several runs in one --workdir: other seeds, rows or columns join what is there.

The paper's top-1 (%) as far as it is known to us, its own network (float 93.23):

    ResNet-44       4w8a*   4w4a*   4w4a    2w4a**   KD-2w4a** (50 images a class)
    real            92.18   91.64   89.19   19.47    90.27
    bns                             88.5             88.52
    inception                       87.44            79.62
    bns+inception                   89.1             88.16
    gaussian                        87.51            70.03

With 4000 images a class KD-2w4a** has real 91.24, BNS 89.6, I 79.59, BNS+I 88.51, G 71.02.

    WRN-28-10 (float 83.69)         4w4a             KD-4w4a (50 images a class)
    real                            64.52            81.7
    bns                             61.48            79.21
    inception                       51.22            53.64
    bns+inception                   61.82            78.88
    gaussian                        47.81            64.8

With 200 a class its KD-4w4a has 82.11, 79.16, 54.02, 78.75 and 65.15. No weights of it are at hand here, and no GPU for KD.

Ours, ResNet-44 (float 93.41) on 1017 test images by the first command, mean of three seeds, 128 images of every source (120
steps), 11 minutes on two cores (AMD EPYC) that other work shared; standard deviations and protocol in
docs/results.md:

                    4w8a*   4w4a*   4w4a    2w4a**
    real            93.15   92.26   89.81   21.83
    bns             92.72   91.67   89.12   22.16
    inception       90.56   89.74   87.94   18.72
    bns+inception   92.92   92.30   89.45   21.63
    gaussian        92.53   90.76   84.92   19.53
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments._harness.launch import relaunch_with_huge_pages

if __name__ == "__main__":
  relaunch_with_huge_pages()

from experiments._harness import quantization_table
from experiments._harness.quantization_table import KD, Column, Options, Published
from experiments._harness.quantization_table import ROWS as ROWS
from experiments._harness.study import Setup, Study, run
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.quantization import QuantRules

# Column: precision of the inner layers, and of the first and last.
_BITS: dict[str, tuple[str, str | None]] = {
  "4w8a*": ("4w8a", "8w8a"),
  "4w4a*": ("4w4a", "8w8a"),
  "4w4a": ("4w4a", None),
  "2w4a**": ("2w4a", "4w4a"),
}
_KD_COLUMNS = ("KD-4w4a", "KD-2w4a**")
PAPER: dict[str, Published] = {
  "resnet44": {
    "4w8a*": (92.18, None, None, None, None),
    "4w4a*": (91.64, None, None, None, None),
    "4w4a": (89.19, 88.5, 87.44, 89.1, 87.51),
    "2w4a**": (19.47, None, None, None, None),
    "KD-2w4a**": (90.27, 88.52, 79.62, 88.16, 70.03),
  },
  "wrn28_10": {
    "4w4a": (64.52, 61.48, 51.22, 61.82, 47.81),
    "KD-4w4a": (81.7, 79.21, 53.64, 78.88, 64.8),
  },
}
"""The paper's numbers by architecture, 50 images a class for KD."""
PAPER_MORE_IMAGES: dict[str, Published] = {
  "resnet44": {"KD-2w4a**, 4000 images a class": (91.24, 89.6, 79.59, 88.51, 71.02)},
  "wrn28_10": {"KD-4w4a, 200 images a class": (82.11, 79.16, 54.02, 78.75, 65.15)},
}
"""The same after KD on more images, columns that the study does not have."""
PAPER_FLOAT = {"resnet44": 93.23, "wrn28_10": 83.69}
LEGEND = "* first and last layer 8 bit, ** 4 bit."


def build(setup: Setup) -> Study:
  """Table 2 for the network of the command line."""
  options = setup.options
  assert isinstance(options, Options)
  is_paper = options.preset == "paper"
  distill_images = options.distill_images or (50 * setup.network.num_classes if is_paper else setup.chosen.images)

  def column(name: str) -> Column:
    bits, first_last = _BITS[name.removeprefix(KD)]
    return Column(QuantRules.parse(bits, first_last=first_last), distill_images if name in _KD_COLUMNS else None)

  arch = setup.network.arch or setup.network.name
  return quantization_table.study(
    setup,
    title=f"Table 2: {setup.network.name}, top-1 (%) after calibration and after distillation (KD) by data source",
    columns={name: column(name) for name in (*_BITS, *_KD_COLUMNS)},
    published=PAPER.get(arch, {}),
    optional=() if is_paper or options.preset == "smoke" else _KD_COLUMNS,
    note=f"{LEGEND} {about_paper(arch)}",
  )


def about_paper(arch: str) -> str:
  """What sets the paper's numbers of an architecture apart from others."""
  if arch not in PAPER:
    return "No published numbers for this network."
  return (
    f"The paper's network is another one (float {PAPER_FLOAT[arch]:g}); its KD has 50 images a class, 16,000 steps."
  )


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = parse(Options, args, "python -m experiments.knowledge_within.table2_cifar", __doc__)
  return run_command(lambda: run(options, name="table2_cifar", build=build, arch="resnet44"))


if __name__ == "__main__":
  sys.exit(main())
