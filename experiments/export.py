"""Hand a network over to another runtime: an ONNX, StableHLO or safetensors file, checked against the network it was made of.

    python -m experiments.export --run runs/cifar_bns-... --format onnx
    python -m experiments.export --network networks/resnet20-4w4a --format stablehlo --out resnet20.stablehlo
    python -m experiments.export --run runs/... --format onnx --form integer --eval-data cifar10.npz:test

--run is the folder of a main job, which holds the network it ended with; --network is a folder of `kwjax.save_quantized`, or of a
float network for a float file. The file is read back and run on images of the run (Gaussian ones without a run), ONNX by
onnxruntime on the CPU, and its logits are compared with those of the simulated network; with --eval-data top-1 of both.
Integer weights need a weight scheme with integer levels: run the main job with --weight-scheme affine0, midrise, sym or symfull.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.cli.export import Options, export


def main(args: Sequence[str] | None = None) -> int:
  """Command line; returns the exit status."""
  options = parse(Options, args, "python -m experiments.export", __doc__)
  return run_command(lambda: export(options))


if __name__ == "__main__":
  sys.exit(main())
