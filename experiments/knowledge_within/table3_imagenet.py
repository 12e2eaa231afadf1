"""Table 3 of Haroush et al. (2020): calibration and distillation by data source on ImageNet networks.

    python -m experiments.knowledge_within.table3_imagenet --eval-data imagenet_samples_500.zip
    python -m experiments.knowledge_within.table3_imagenet --arch resnet18 --weights torchvision \
        --eval-data tfds:imagenet2012:validation --real-data tfds:imagenet2012:train --preset paper

The first runs on the embedded EfficientNet-Lite0 (extra `demo`; the same as --arch efficientnet_lite0 --weights demo); the
second, or mobilenet_v2, or densenet121, is the published protocol, on accelerators.

Rows: real training images (`real`, a comparison; left out without --real-data), images made from BatchNorm statistics (`bns`),
by class (`inception`), by both (`bns+inception`), and Gaussian noise (`gaussian`). Columns: top-1 after calibration, and after
distillation (`KD-`); `*`: first and last layer 8 bit; `-1x1`: 1x1 convolutions 8 bit; `-100`: on 100 images a class. Which
layers keep 8 bit at 4w4a depends on the network, as in the paper: first and last in ResNet-18, 1x1 convolutions in
MobileNetV2, none in DenseNet-121. Lite0 has both variants, other networks the first.
The KD columns are long: at `--preset cpu` they are measured when they are named (`--columns 'KD-4w4a*'`), and `-100` always is.
The table can be filled over several runs in one --workdir: other seeds, rows or columns join what is there.

The paper's top-1 (%):

                    real     bns   inception   bns+inception   gaussian
    ResNet-18 (float 69.75)
    8w8a           69.63   69.55       69.6          69.57        68.94
    4w4a*          54.72   55.29       38.25         55.49        53.02
    KD-4w4a*       68.63   67.98       62.8          68.06        63.98    (10 images a class)
    KD-4w4a*-100   68.68   68.14       63.1          67.95        63.58
    MobileNetV2 (float 71.88)
    8w8a           71.26   71.34       71.2          71.32        71.17
    4w4a-1x1       15.1    16.17       10.55         16.1         13.36
    KD-4w4a-1x1    68.5    66.4        53.13         66.07        36.95
    DenseNet-121 (float 74.65)
    8w8a           74.41   74.41       74.22         74.23        74.16
    4w4a           45.27   43.54       40.46         43.88        46.89
    KD-4w4a        71.08   71.26       63.98         70.72        63.59

How many images a class its KD of the last two networks had is not known to us; ours has 10.

Ours so far, EfficientNet-Lite0 (float 87.8) on 500 images, most of which the network was trained on; seed 0, --images 32 (one
batch of 60 steps), standard error of one top-1 about 2 points:

                             bns   inception   bns+inception   gaussian
    8w8a                    87.2        87.2            87.4       86.0
    4w4a*                   25.4        26.8            24.6       20.4
    4w4a-1x1                56.2        55.4            57.6       35.0

That took 16 minutes on two cores (AMD EPYC) that others used as well, 2 to 5 of them a batch; `--preset cpu` makes two batches
of each scheme. `--dry-run` says what a command would cost.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from experiments._harness.launch import relaunch_with_huge_pages

if __name__ == "__main__":
  relaunch_with_huge_pages()

from experiments._harness import quantization_table
from experiments._harness.quantization_table import KD, Column, Options, Published
from experiments._harness.study import Setup, Study, run
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.quantization import QuantRules

_DEFAULT = "efficientnet_lite0"
_RULES = {
  "8w8a": QuantRules.parse("8w8a"),
  "4w4a": QuantRules.parse("4w4a"),
  "4w4a*": QuantRules.parse("4w4a", first_last="8w8a"),
  "4w4a-1x1": QuantRules.parse("4w4a", overrides={"1x1": "8w8a"}),
}
# Which of these a network has at 4 bits.
_VARIANTS: dict[str, tuple[str, ...]] = {
  "mobilenet_v2": ("4w4a-1x1",),
  "densenet121": ("4w4a",),
  _DEFAULT: ("4w4a*", "4w4a-1x1"),
}
_PER_CLASS = 10
_MANY_PER_CLASS, _MANY = 100, "-100"
PAPER: dict[str, Published] = {
  "resnet18": {
    "8w8a": (69.63, 69.55, 69.6, 69.57, 68.94),
    "4w4a*": (54.72, 55.29, 38.25, 55.49, 53.02),
    "KD-4w4a*": (68.63, 67.98, 62.8, 68.06, 63.98),
    "KD-4w4a*-100": (68.68, 68.14, 63.1, 67.95, 63.58),
  },
  "mobilenet_v2": {
    "8w8a": (71.26, 71.34, 71.2, 71.32, 71.17),
    "4w4a-1x1": (15.1, 16.17, 10.55, 16.1, 13.36),
    "KD-4w4a-1x1": (68.5, 66.4, 53.13, 66.07, 36.95),
  },
  "densenet121": {
    "8w8a": (74.41, 74.41, 74.22, 74.23, 74.16),
    "4w4a": (45.27, 43.54, 40.46, 43.88, 46.89),
    "KD-4w4a": (71.08, 71.26, 63.98, 70.72, 63.59),
  },
}
"""The paper's numbers by architecture."""
PAPER_FLOAT = {"resnet18": 69.75, "mobilenet_v2": 71.88, "densenet121": 74.65}
LEGEND = "* first and last layer 8 bit, -1x1 1x1 convolutions 8 bit, -100 100 images a class."


def build(setup: Setup) -> Study:
  """Table 3 for the network of the command line."""
  options = setup.options
  assert isinstance(options, Options)
  if options.preset == "cpu" and options.images is None:
    # Statistics of a part of a batch are worse than those of a whole one.
    setup = setup._replace(chosen=dataclasses.replace(setup.chosen, images=2 * setup.chosen.batch_size))
  arch = setup.network.arch or setup.network.name
  columns = _columns(setup, arch, options.distill_images)
  long = [name for name in columns if name.startswith(KD)]
  if options.preset != "cpu":
    long = [name for name in long if name.endswith(_MANY)]
  return quantization_table.study(
    setup,
    title=f"Table 3: {setup.network.name}, top-1 (%) after calibration and after distillation (KD) by data source",
    columns=columns,
    published=PAPER.get(arch, {}),
    optional=long,
    note=f"{LEGEND} {about_paper(arch)}",
  )


def _columns(setup: Setup, arch: str, distill_images: int | None) -> dict[str, Column]:
  is_paper, classes = setup.options.preset == "paper", setup.network.num_classes
  variants = _VARIANTS.get(arch, ("4w4a*",))
  few = distill_images or (_PER_CLASS * classes if is_paper else setup.chosen.images)
  columns = {name: Column(_RULES[name]) for name in ("8w8a", *variants)}
  columns |= {f"{KD}{name}": Column(_RULES[name], few) for name in variants}
  for name in PAPER.get(arch, {}):
    if name.endswith(_MANY):
      missing = (
        None if is_paper else f"{name} needs --preset paper: {_MANY_PER_CLASS} images for each of {classes} classes"
      )
      columns[name] = Column(_RULES[name.removeprefix(KD).removesuffix(_MANY)], _MANY_PER_CLASS * classes, missing)
  return columns


def about_paper(arch: str) -> str:
  """What sets the paper's numbers of an architecture apart from others."""
  if arch not in PAPER:
    return "No published numbers for this network."
  return f"The paper's network has float {PAPER_FLOAT[arch]:g}; its KD has 44,000 steps."


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = parse(Options, args, "python -m experiments.knowledge_within.table3_imagenet", __doc__)
  return run_command(lambda: run(options, name="table3_imagenet", build=build, arch="resnet18", default=_DEFAULT))


if __name__ == "__main__":
  sys.exit(main())
