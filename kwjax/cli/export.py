"""`kwjax export`: a network as a file for another runtime, checked against the network it was made of."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import tyro

from kwjax.cli.command import load_any, use_compilation_cache
from kwjax.errors import KwjaxError
from kwjax.export import (
  Comparison,
  compare,
  export_onnx,
  export_safetensors,
  export_stablehlo,
  load_safetensors,
  load_stablehlo,
  onnx_runner,
)
from kwjax.export.tensors import run_integer
from kwjax.export.verify import Run, in_batches, network_runner
from kwjax.network import Network
from kwjax.quantization import QuantizedNetwork
from kwjax.runtime.data import ImageData, load_data
from kwjax.runtime.files import read_sealed_json
from kwjax.runtime.reporting.messages import log
from kwjax.synthesis.store import ImageStore

_SUFFIXES = {"onnx": ".onnx", "stablehlo": ".stablehlo", "safetensors": ".safetensors"}
_QUANTIZED = "quantized"


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the command; see `kwjax.export`."""

  format: Literal["onnx", "stablehlo", "safetensors"]
  """Of the file."""
  run: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="WORKDIR")] = None
  """Folder of a main job; its last precision, fine-tuned where the job did that, is exported."""
  network: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FOLDER")] = None
  """A quantized or float network instead of a run."""
  out: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE")] = None
  """The file. Default: WORKDIR/export/NAME.FORMAT."""
  opset: int = 20
  """ONNX: operator set, 13 to 23. From 21 on kernels of at most 4 bits are stored as int4."""
  form: Literal["qdq", "integer"] = "qdq"
  """ONNX: qdq is QuantizeLinear and DequantizeLinear alone; integer also has ConvInteger, which is faster in onnxruntime."""
  weights: Literal["auto", "int8"] = "auto"
  """ONNX: auto stores kernels as uint8 where int8 could saturate on x86 processors without VNNI; int8 never does."""
  layout: Literal["nhwc", "nchw"] = "nhwc"
  """ONNX: order of the axes of the images."""
  batch: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
  """Images at a time, fixed. Default: any number."""
  allow_float_weights: bool = False
  """Keep layers whose weights have no integer form in float instead of refusing them."""
  platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")
  """StableHLO: where it is to run."""
  images: int = 64
  """Images that the logits are compared on."""
  eval_data: str | None = None
  """Labelled images on which top-1 of the network and of the file is measured."""


class Exported(NamedTuple):
  """A written file: facts about it for people, and how it is run."""

  facts: dict[str, Any]
  run: Run


def export(options: Options) -> int:
  """Write the file, check it and print what is in it as JSON.

  Raises:
    KwjaxError: anything the user can mend.
  """
  use_compilation_cache()
  if options.images < 1:
    raise KwjaxError(f"--images must be at least 1, found {options.images}")
  folder = _folder(options)
  network = load_any(folder)
  out = options.out or folder.parent / "export" / f"{network.name.replace(' ', '-')}{_SUFFIXES[options.format]}"
  data = _eval_data(options, network)
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise KwjaxError(f"cannot write to {out.parent}: {error.strerror}") from error
  exported = _WRITERS[options.format](options, network, out)
  images, name = _images(options, network)
  log(
    f"wrote {out} ({out.stat().st_size:,} bytes); comparing it with the simulated network on {len(images)} {name} images"
  )
  size = options.batch or 64
  simulated, found = (in_batches(run, images, size) for run in (network_runner(network), exported.run))
  comparison = compare(simulated, found)
  report = {**exported.facts, "network": network.name, "compared_on": name, "comparison": comparison._asdict()}
  log(_as_text(comparison))
  if data is not None:
    report["top1"] = _top1(data, network, exported.run, size)
    log(
      f"top-1 on {len(data)} images of {data.name}: network {report['top1']['network']:.4f}, file {report['top1']['file']:.4f}"
    )
  print(json.dumps(report, indent=2, default=str))
  return 0


def _folder(options: Options) -> pathlib.Path:
  if (options.run is None) == (options.network is None):
    raise KwjaxError("name what to export: either --run WORKDIR or --network FOLDER")
  if options.network is not None:
    return options.network
  assert options.run is not None
  if not (options.run / _QUANTIZED).is_dir():
    raise KwjaxError(f"{options.run} is not the folder of a finished main job: it has no folder {_QUANTIZED}")
  return options.run / _QUANTIZED


def _eval_data(options: Options, network: Network | QuantizedNetwork) -> ImageData | None:
  if options.eval_data is None:
    return None
  data = load_data(options.eval_data, image_shape=network.image_shape, num_classes=network.num_classes)
  if data.labels is None:
    raise KwjaxError(f"--eval-data {options.eval_data} has no labels")
  return data


def _images(options: Options, network: Network | QuantizedNetwork) -> tuple[np.ndarray, str]:
  """Images that the run made, or Gaussian ones."""
  for folder in ("synthesis", "gaussian") if options.run else ():
    place = options.run / folder / "images"  # type: ignore[operator]
    if (place / "manifest.json").exists():
      settings = read_sealed_json(place / "manifest.json")["settings"]
      return ImageStore(place, settings=settings).images().images[: options.images], folder
  shape, mean, std = network.image_shape, network.input_mean, network.input_std
  noise = jax.random.normal(jax.random.key(0), (options.images, *shape))
  return np.clip(np.asarray(noise) * np.asarray(std) + np.asarray(mean), 0, 1).astype(np.float32), "Gaussian"


def _as_text(found: Comparison) -> str:
  return (
    f"largest difference of a logit {found.max_difference:.3g}, root mean square {found.rms_difference:.3g} "
    f"(logits: {found.rms_logit:.3g}); the same class for {found.agreement:.1%} of {found.images} images"
  )


def _top1(data: ImageData, network: Network | QuantizedNetwork, run: Run, size: int) -> dict[str, Any]:
  hits = np.zeros(2, int)
  simulate = network_runner(network)
  for images, labels, _ in data.batches(size):
    logits = [in_batches(step, images, size) for step in (simulate, run)]
    hits += np.asarray([(v.argmax(1) == labels).sum() for v in logits])
  return {
    "network": float(hits[0] / len(data)),
    "file": float(hits[1] / len(data)),
    "count": len(data),
    "data": data.name,
  }


def _onnx(options: Options, network: Network | QuantizedNetwork, out: pathlib.Path) -> Exported:
  facts = export_onnx(
    network,
    out,
    opset=options.opset,
    form=options.form,
    weights=options.weights,
    layout=options.layout,
    batch=options.batch,
    allow_float_weights=options.allow_float_weights,
  )
  for layer, reason in facts.float_layers.items():
    log(f"layer {layer} stays float: {reason}")
  for note in facts.notes:
    log(f"note: {note}")
  return Exported(facts._asdict(), onnx_runner(out))


def _stablehlo(options: Options, network: Network | QuantizedNetwork, out: pathlib.Path) -> Exported:
  facts = export_stablehlo(network, out, platforms=options.platforms, batch=options.batch)
  if facts.float_layers and isinstance(network, QuantizedNetwork):
    log(f"{len(facts.float_layers)} kernels are stored as float32: {', '.join(facts.float_layers)}")
  if jax.default_backend() not in _backends(facts.platforms):
    raise KwjaxError(
      f"{out} was written for {', '.join(facts.platforms)}, this machine has {jax.default_backend()}: not checked"
    )
  loaded = load_stablehlo(out)
  return Exported(facts._asdict(), lambda images: np.asarray(loaded(images)))


def _backends(platforms: Sequence[str]) -> set[str]:
  return {"gpu" if name in ("cuda", "rocm") else name for name in platforms}


def _safetensors(options: Options, network: Network | QuantizedNetwork, out: pathlib.Path) -> Exported:
  if not isinstance(network, QuantizedNetwork):
    raise KwjaxError(f"--format safetensors is for quantized networks, {network.name} is float and is one already")
  export_safetensors(network, out, allow_float_weights=options.allow_float_weights)
  stored, base = load_safetensors(out), network.network
  run = jax.jit(functools.partial(run_integer, stored, base))
  facts = {"path": out, "size": out.stat().st_size, "integer_layers": list(stored.weights)}
  return Exported(facts, lambda images: np.asarray(run(images)))


_WRITERS = {"onnx": _onnx, "stablehlo": _stablehlo, "safetensors": _safetensors}
