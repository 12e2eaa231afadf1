"""The same network in onnxruntime in float and in 8 bits, timed in turn on the same machine in the same minutes.

    python -m benchmarks.onnx_runtime --networks resnet18,mobilenet_v2 --json onnx_runtime.json

Random weights, running statistics and activation ranges of random images: time does not depend on what the weights are. The
files are those that `kwjax.export_onnx` writes: float, `form="qdq"` and `form="integer"`; each round times every file once.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import machine
from kwjax.batchnorm import observe
from kwjax.errors import KwjaxError
from kwjax.export import export_onnx
from kwjax.export.verify import compare, network_runner, onnx_runner
from kwjax.models import get_model, model_info
from kwjax.network import Network
from kwjax.quantization import QuantizedNetwork, QuantRules, observe_ranges, quantize, ranges_from
from kwjax.runtime.files import write_json

_FLOAT = "float"


def random_network(name: str, size: int | None = None) -> tuple[Network, np.ndarray]:
  """A network with random weights whose BatchNorm layers know the statistics of the images that come with it.

  Args:
    name: of `known_models()`.
    size: side of the images in pixels, or None for the network's own.

  Raises:
    KwjaxError: the name is unknown.
  """
  info = model_info(name)
  shape = info.image_shape if size is None else (size, size, 3)
  module = get_model(name)
  images = np.random.default_rng(0).random((4, *shape), np.float32)
  random = np.random.default_rng(1)

  def fill(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
    kind = path[-1].key
    if kind == "kernel":
      value = random.normal(size=leaf.shape, scale=(2 / np.prod(leaf.shape[:-1])) ** 0.5)
    else:
      value = np.full(leaf.shape, float(kind in ("scale", "var")))
    return value.astype(np.float32)

  image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  variables = jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda x: module.init(jax.random.key(0), x), image))
  network = Network(
    module, variables, image_shape=shape, input_mean=info.input_mean, input_std=info.input_std, name=name
  )
  # With every layer on the statistics of the batch, each is measured behind normalised ones.
  found = jax.jit(lambda net, x: observe(net, x, current=(".*",))[1])(network, images)
  statistics_of: dict[str, Any] = jax.tree.map(np.asarray, dict(network.variables["batch_stats"]))
  for layer, moments in found.items():
    place = statistics_of
    for key in layer.split("/"):
      place = place[key]
    place["mean"], place["var"] = np.asarray(moments.mean), np.asarray(moments.var)
  return network.replace(variables={**network.variables, "batch_stats": statistics_of}), images


def quantized(network: Network, images: np.ndarray, bits: str) -> QuantizedNetwork:
  """By symmetric kernels and the ranges of the images."""
  rules = QuantRules.parse(bits, weights="sym")
  table = observe_ranges(network, images)
  return quantize(network, rules, ranges_from(table, rules, key=jax.random.key(0), steps=1, batch_size=16))


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
  """Median times in ms of every file of one network, and how much faster than float each low precision is."""
  network, images = random_network(name, arguments.image_size)
  batch = np.resize(images, (arguments.batch, *network.image_shape))
  with tempfile.TemporaryDirectory() as folder:
    runs, sizes, differences = {}, {}, {}
    jobs: list[tuple[str, Network | QuantizedNetwork, Literal["qdq", "integer"]]] = [(_FLOAT, network, "qdq")]
    for bits in arguments.bits.split(","):
      student = quantized(network, images, bits)
      jobs += [(f"{bits} qdq", student, "qdq"), (f"{bits} integer", student, "integer")]
    for label, what, form in jobs:
      path = pathlib.Path(folder) / f"{label.replace(' ', '-')}.onnx"
      sizes[label] = export_onnx(what, path, form=form).size
      runs[label] = onnx_runner(path, session_options={}, threads=arguments.threads)
      if not arguments.no_check:
        differences[label] = compare(network_runner(what)(batch), runs[label](batch))._asdict()
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(arguments.repeats + 1):
      for label, run in runs.items():
        begin = time.perf_counter()
        run(batch)
        times[label].append(1e3 * (time.perf_counter() - begin))
  # The first round warms caches and allocators up.
  medians = {label: statistics.median(values[1:]) for label, values in times.items()}
  rounds = {label: [a / b for a, b in zip(times[_FLOAT][1:], times[label][1:], strict=True)] for label in times}
  return {
    "network": name,
    "image_size": network.image_shape[0],
    "batch": arguments.batch,
    "threads": arguments.threads,
    "milliseconds": medians,
    "faster_than_float": {label: statistics.median(values) for label, values in rounds.items()},
    "bytes": sizes,
    "difference_from_simulation": differences,
  }


def main(args: Sequence[str] | None = None) -> int:
  """Command line; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--networks", default="resnet18", metavar="A,B", help="networks to time (default: %(default)s)")
  parser.add_argument("--bits", default="8w8a", metavar="A,B", help="precisions (default: %(default)s)")
  parser.add_argument("--batch", type=int, default=1, help="images at a time (default: %(default)s)")
  parser.add_argument(
    "--repeats", type=int, default=15, help="rounds, each file once in a round (default: %(default)s)"
  )
  parser.add_argument("--threads", type=int, default=0, help="of one operation; 0: all cores (default: %(default)s)")
  parser.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images (default: the network's)")
  parser.add_argument("--no-check", action="store_true", help="do not compare the files' logits with the networks'")
  parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there, too")
  arguments = parser.parse_args(args)
  results = []
  try:
    if min(arguments.batch, arguments.repeats) < 1:
      raise KwjaxError("--batch and --repeats must be at least 1")
    print(f"{'network':<20}{'file':<16}{'ms':>9}{'faster than float':>19}{'MB':>8}")
    for name in arguments.networks.split(","):
      found = measure(name, arguments)
      results.append(found)
      for label, value in found["milliseconds"].items():
        ratio, size = found["faster_than_float"][label], found["bytes"][label] / 1e6
        print(f"{name:<20}{label:<16}{value:>9.1f}{ratio:>19.2f}{size:>8.1f}", flush=True)
      if arguments.json:
        write_json(arguments.json, {"benchmark": "onnx_runtime", "machine": machine(), "results": results})
  except KwjaxError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
