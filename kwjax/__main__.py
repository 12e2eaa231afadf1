"""`python -m kwjax`: what there is to run; with --version, what it runs on."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

_COMMANDS = {
  "experiments.imagenet_bns": "ImageNet network -> images, low-precision copy, report.html; embedded network by default",
  "experiments.cifar_bns": "the same for 32x32 networks",
  "experiments.export": "a finished run -> ONNX, StableHLO or safetensors",
  "experiments.knowledge_within.table1_ablation": "distillation losses (table 1; table2_cifar ... table6_objectives likewise)",
  "experiments.knowledge_within.figure2_monitor": "J_KL over synthesis (figure3_quality ... figure7_bias likewise)",
  "experiments.calibration.table_calibration": "ways to calibrate, side by side (table_mixed: bits by layer against equal bits)",
  "experiments.noise.distill": "a student from pure noise (noise_activations, toy_circles, leaves_bns likewise)",
  "experiments.results_page": "finished studies -> docs/results.md",
  "experiments.prepare_data": "original archives of public data sets -> TFDS form, offline",
  "experiments.train_reference": "train a network of your own to compress",
  "weights_conversion": "PyTorch or safetensors checkpoint -> network folder",
  "benchmarks.sample_step": "speed beside PyTorch (distill_step, calibrate likewise; scaling, time_to_quality, onnx_runtime)",
}
_PACKAGES = ("jax", "jaxlib", "flax")


def installed_commands() -> dict[str, str]:
  """`{module: what it does}` of the commands that are installed."""
  return {module: words for module, words in _COMMANDS.items() if _is_installed(module)}


def _is_installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False  # of its package


def version_text() -> str:
  """Versions of kwjax, what it computes with and Python, and the devices, a line each."""
  from kwjax.runtime.report import versions

  found = versions()
  lines = [f"kwjax {found['kwjax']}", *(f"{name} {found[name]}" for name in _PACKAGES), f"python {found['python']}"]
  return "\n".join([*lines, f"devices {found['devices']} x {found['device']} ({found['backend']})"])


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the package; returns the exit status."""
  commands = installed_commands()
  width = max(map(len, commands), default=0)
  listed = "\n".join(f"  python -m {module:{width}}  {words}" for module, words in commands.items())
  parser = argparse.ArgumentParser(
    prog="python -m kwjax",
    description="Compress a trained CNN when you may not touch its training data.",
    epilog=f"commands (each explains itself with --help):\n{listed}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--version", action="store_true", help="versions and devices")
  if parser.parse_args(args).version:
    print(version_text())
  else:
    parser.print_help()
  return 0


if __name__ == "__main__":
  sys.exit(main())
