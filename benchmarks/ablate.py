"""What each fast form of `kwjax.kernels` brings: a step with all of them against the step without one, in turn.

    python -m benchmarks.ablate --step sample_step --networks resnet18 --forms winograd,max_pool

Both are processes of their own with the same compiler options. CPU time is compared, so other work on the machine changes
little. A ratio above one is what the form saves; forms that no layer of a network takes are at 1.00.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import statistics
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import harness
from kwjax.errors import KwjaxError
from kwjax.runtime.files import write_json

STEPS = ("sample_step", "distill_step", "calibrate")


def _never(*arguments: Any) -> bool:
  return False


def _put(module: types.ModuleType, **functions: Any) -> None:
  vars(module).update(functions)


def _drop_winograd() -> None:
  from kwjax.kernels import winograd

  _put(winograd, is_worthwhile=_never, has_fast_kernel_gradient=_never)


def _drop_kernel_products() -> None:
  from kwjax.kernels import im2col

  _put(im2col, has_fast_kernel_gradient=_never)


def _drop_grouped() -> None:
  from kwjax.kernels import dense

  _put(dense, _neighbours=lambda channels, features: 1)


def _drop_depthwise() -> None:
  from kwjax.kernels import convolution
  from kwjax.kernels.windows import native_convolution

  _put(convolution, depthwise=lambda images, kernel, window: native_convolution(images, kernel, window, None))


def _drop_depthwise_gradient() -> None:
  import jax

  from kwjax.kernels import convolution, depthwise

  # By autodiff of the sum of shifted images.
  _put(convolution, depthwise=jax.jit(depthwise._shifted, static_argnums=2, inline=True))


def _drop_parts() -> None:
  from kwjax.kernels import depthwise

  _put(depthwise, sum_over_parts=lambda function, images, cotangent, *sizes, **options: function(images, cotangent))


def _drop_pointwise() -> None:
  from kwjax.kernels import convolution
  from kwjax.kernels.windows import Window, native_convolution

  window = Window((1, 1), (1, 1), ((0, 0), (0, 0)))
  _put(
    convolution,
    _pointwise=lambda images, kernel, precision: native_convolution(images, kernel[None, None], window, precision),
  )


def _drop_max_pool() -> None:
  from kwjax.kernels import layers

  _put(layers, _pool=lambda module, x, proceed: proceed(x))


def _drop_computed_once() -> None:
  from kwjax.kernels import layers

  _put(layers, _is_composite=lambda module: False)


def _drop_wide_vectors() -> None:
  from kwjax.kernels import processor

  _put(processor, has_wide_vectors=lambda: False)


FORMS: dict[str, Callable[[], None]] = {
  "winograd": _drop_winograd,
  "kernel_products": _drop_kernel_products,
  "grouped": _drop_grouped,
  "depthwise": _drop_depthwise,
  "depthwise_gradient": _drop_depthwise_gradient,
  "depthwise_parts": _drop_parts,
  "pointwise": _drop_pointwise,
  "max_pool": _drop_max_pool,
  "computed_once": _drop_computed_once,
  "wide_vectors": _drop_wide_vectors,
}
"""Each takes one form out of this process."""


def prepare_kwjax(spec: harness.Spec, network: Any, group: Any) -> Callable[[], None]:
  """The step of `spec["step"]` without the form `spec["without"]`."""
  if spec["without"]:
    FORMS[spec["without"]]()
  return importlib.import_module(f"benchmarks.{spec['step']}").prepare_kwjax(spec, network, group)


def ablate(spec: harness.Spec, forms: Sequence[str], *, steps: int, repeats: int) -> list[dict[str, Any]]:
  """CPU seconds of the step without each form over those of the whole step.

  Args:
    spec: `step`, `network`, `image_size` and what that step's `prepare_kwjax` reads.
    forms: names in `FORMS`.
    steps: of each side in a round.
    repeats: rounds.

  Raises:
    KwjaxError: a side cannot run.
  """
  spec = {**spec, "module": "benchmarks.ablate", "framework": "kwjax", "clock": "cpu"}
  whole = harness.Worker({**spec, "without": None})
  found = []
  try:
    whole.ask(1)
    for form in forms:
      other = harness.Worker({**spec, "without": form})
      try:
        other.ask(1)
        rounds = [(whole.ask(steps), other.ask(steps)) for _ in range(repeats)]
      finally:
        other.close()
      ratios = [statistics.median(without) / statistics.median(with_it) for with_it, without in rounds]
      times = [1e3 * statistics.median([t for r in rounds for t in r[side]]) for side in (0, 1)]
      names = {key: spec[key] for key in ("step", "network", "image_size", "batch")}
      found.append(
        {**names, "form": form, "with_ms": times[0], "without_ms": times[1], "ratio": times[1] / times[0]}
        | {"ratio_low": min(ratios), "ratio_high": max(ratios)}
      )
  finally:
    whole.close()
  return found


def main(args: Sequence[str] | None = None) -> int:
  """Command line; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--step", choices=STEPS, default=STEPS[0], help="default: %(default)s")
  parser.add_argument("--networks", default=",".join(harness.NETWORKS), metavar="A,B", help="default: %(default)s")
  parser.add_argument("--forms", default=",".join(FORMS), metavar="A,B", help="default: %(default)s")
  parser.add_argument("--steps", type=int, default=2, help="steps of each side in a round (default: %(default)s)")
  parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
  parser.add_argument("--batch", type=int, metavar="N", help="images a step (default: 128 at 32x32, else 16)")
  parser.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images (default: the network's)")
  parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there, too")
  options = parser.parse_args(args)
  options.duplicates = options.images = None
  results: list[dict[str, Any]] = []
  try:
    forms = [name for name in options.forms.split(",") if name]
    if unknown := [name for name in forms if name not in FORMS]:
      raise KwjaxError(f"unknown form {unknown[0]!r}; known: {', '.join(FORMS)}")
    build = importlib.import_module(f"benchmarks.{options.step}").build
    for name in options.networks.split(","):
      spec = {"network": name, "step": options.step, **build(name, options)}
      for row in ablate(spec, forms, steps=options.steps, repeats=options.repeats):
        results.append(row)
        print(
          "{step:<13}{network:<19}without {form:<19}{without_ms:>8.1f} of {with_ms:>8.1f} ms: {ratio:.3f} "
          "({ratio_low:.3f}-{ratio_high:.3f})".format(**row),
          flush=True,
        )
        if options.json:
          write_json(options.json, {"benchmark": "ablate", "machine": harness.machine(), "results": results})
  except KwjaxError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
