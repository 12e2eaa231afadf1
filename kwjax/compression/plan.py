"""The arguments of a compression, read and checked before any work."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kwjax.compression.settings import FineTuning, Sizes, memory_need, sizes_for, synthesis_config
from kwjax.compression.workspace import REAL_KEY
from kwjax.distillation import DistillConfig
from kwjax.errors import DataError, KwjaxError
from kwjax.network import Network, fingerprint
from kwjax.quantization import QuantRules
from kwjax.quantization.methods import METHODS, Method
from kwjax.reconstruction import ReconstructConfig
from kwjax.runtime.data.images import ImageData, array_data, load_data
from kwjax.runtime.devices import memory
from kwjax.runtime.identity import identity
from kwjax.synthesis import SampleSet, SynthesisConfig

Images = np.ndarray | jax.Array | ImageData | str
Baselines = Mapping[str, Images | SynthesisConfig]
EvalData = ImageData | tuple[Any, Any] | str
GIVEN = "given"
_SCHEMES = ("bns", "inception", "bns+inception", "deepinversion", "gaussian")
_RESERVED = ("stages", "synthesis", "distillation", "quantized", "figures", "tensorboard", GIVEN)


class Plan(NamedTuple):
  """What a compression does.

  Attributes:
    key: everything random derives from it.
    scheme: how images are made, or "given".
    config: of the synthesis; None where images are given.
    given: these images, the held-out ones last; or None.
    num_images: images that calibrate.
    total: those and the held-out ones.
    views: of each synthetic image that calibrate.
    rules: of every precision, with the ranges of the method.
    method: of the calibration.
    reconstruct: settings of the reconstruction, or None.
    finetune: settings of the fine-tuning.
    baselines: other image sets.
    eval_data: images to evaluate on, or None.
  """

  key: jax.Array
  scheme: str
  config: SynthesisConfig | None
  given: SampleSet | None
  num_images: int
  total: int
  views: int
  rules: Mapping[str, QuantRules]
  method: Method
  reconstruct: ReconstructConfig | None
  finetune: FineTuning | DistillConfig
  baselines: Mapping[str, ImageData | SynthesisConfig]
  eval_data: ImageData | None

  def need(self, network: Network, devices: int) -> memory.Need:
    """Memory at the peak."""
    trained = self.finetune.batch_size if self.finetune.steps else 0
    return memory_need(
      network,
      self.config,
      images=self.total + self.num_images * (self.views - 1),
      trained=trained or 0,
      devices=devices,
    )

  def settings(self, network: Network) -> dict[str, Any]:
    """Everything that the result depends on, JSON-able."""
    finetune = self.finetune
    return {
      "network": fingerprint(network),
      "key": np.asarray(jax.random.key_data(self.key)).tolist(),
      "scheme": self.scheme,
      "config": None if self.config is None else self.config.to_json(),
      "given": None if self.given is None else hashlib.sha256(self.given.images.tobytes()).hexdigest(),
      "images": self.num_images,
      "total": self.total,
      "views": self.views,
      "rules": {bits: rules.to_json() for bits, rules in self.rules.items()},
      "method": self.method._asdict(),
      "reconstruct": None if self.reconstruct is None else self.reconstruct.to_json(),
      "finetune": finetune.to_json() if isinstance(finetune, DistillConfig) else dataclasses.asdict(finetune),
      "baselines": {
        name: found.to_json() if isinstance(found, SynthesisConfig) else identity(found)
        for name, found in self.baselines.items()
      },
      "eval_data": None if self.eval_data is None else identity(self.eval_data),
    }


def make_plan(
  network: Network,
  bits: Sequence[str],
  *,
  key: jax.Array,
  images: Images | None,
  scheme: str,
  calibration: str | Method,
  first_last: str | None,
  overrides: Mapping[str, str] | Sequence[tuple[str, str]],
  weights: str | None,
  num_images: int | None,
  held_out: int | None,
  views: int,
  config: SynthesisConfig | None,
  reconstruct: bool | ReconstructConfig,
  finetune: bool | FineTuning | DistillConfig,
  baselines: Baselines | None,
  eval_data: EvalData | None,
) -> Plan:
  """The plan for the arguments of `compress`.

  Raises:
    KwjaxError: as `compress`.
  """
  method = _method(calibration)
  if weights is None:
    weights = "auto" if calibration == "paper" else "integer"
  rules = parse_rules(network, bits, method=method, first_last=first_last, overrides=overrides, weights=weights)
  for name, number, least in (("num_images", num_images, 1), ("held_out", held_out, 0), ("views", views, 1)):
    if number is not None and number < least:
      raise KwjaxError(f"{name} must be at least {least}, found {number}")
  chosen = sizes_for(network, "cpu", {})
  given = None
  if images is not None:
    if config is not None:
      raise KwjaxError("config says how images are synthesized, but images are given: leave one out")
    given, num_images = _given(network, images, num_images, held_out, chosen, jax.random.fold_in(key, REAL_KEY))
    scheme, total = GIVEN, len(given.images)
  else:
    if scheme not in _SCHEMES:
      raise KwjaxError(f"unknown scheme {scheme!r}; known: {', '.join(_SCHEMES)}")
    num_images = chosen.images if num_images is None else num_images
    total = num_images + (chosen.held_out if held_out is None else held_out)
    config = config or synthesis_config(network, scheme, chosen)
    if config.scheme != scheme:
      raise KwjaxError(f"config is of the scheme {config.scheme!r}, but scheme is {scheme!r}")
  if views > 1 and (config is None or not config.is_optimized or config.augmentation.is_identity):
    # Nothing has given their other views the right statistics.
    raise KwjaxError(
      f"{views} views need images that are synthesized with an augmentation, and {scheme} images are not"
    )
  if reconstruct is True:
    iterations, size = chosen.reconstruct_iterations, chosen.reconstruct_batch_size
    reconstruct = iterations > 0 and ReconstructConfig(iterations=iterations, batch_size=size)
  if isinstance(finetune, bool):
    finetune = FineTuning() if finetune else FineTuning(steps=0)
  if isinstance(finetune, FineTuning):
    finetune = finetune.filled(chosen)
    finetune.config(network, scheme)  # refuses numbers out of range
  return Plan(
    key=key,
    scheme=scheme,
    config=config,
    given=given,
    num_images=num_images,
    total=total,
    views=views,
    rules=rules,
    method=method,
    reconstruct=reconstruct or None,
    finetune=finetune,
    baselines={name: _checked_baseline(network, name, found, scheme) for name, found in (baselines or {}).items()},
    eval_data=None if eval_data is None else as_data(network, eval_data, "eval_data"),
  )


def parse_rules(
  network: Network,
  bits: Sequence[str],
  *,
  method: Method,
  first_last: str | None,
  overrides: Mapping[str, str] | Sequence[tuple[str, str]] = (),
  weights: str = "integer",
) -> dict[str, QuantRules]:
  """Rules of every precision, checked against the network's layers.

  Raises:
    KwjaxError: no precision is given, one is malformed or given twice, or an override matches no layer.
  """
  if isinstance(bits, str):
    raise KwjaxError(f"bits takes a sequence of precisions such as ({bits!r},), found the text {bits!r}")
  if not bits or len(set(bits)) != len(bits):
    raise KwjaxError(f"bits needs one or more different precisions such as 8w8a 4w4a, found {' '.join(bits)!r}")
  rules = {
    text: method.applied(QuantRules.parse(text, first_last=first_last, overrides=overrides, weights=weights))
    for text in bits
  }
  for rule in rules.values():
    rule.resolve(network)
  return rules


def check_pace(checkpoint_seconds: float, checkpoint_steps: int) -> None:
  """Refuse numbers that would stop the run only when their part begins.

  Raises:
    KwjaxError: one is out of range.
  """
  if not 0 <= checkpoint_seconds < math.inf:
    raise KwjaxError(f"checkpoint_seconds must be a number of at least 0, found {checkpoint_seconds}")
  if checkpoint_steps < 1:
    raise KwjaxError(f"checkpoint_steps must be at least 1, found {checkpoint_steps}")


def as_data(network: Network, data: ImageData | tuple[Any, Any] | Images, name: str) -> ImageData:
  """Images in any of the forms that are taken, as a data set that fits the network.

  Raises:
    DataError: they do not fit the network, or cannot be read.
  """
  if isinstance(data, str):
    return load_data(data, image_shape=network.image_shape, num_classes=network.num_classes)
  if not isinstance(data, ImageData):
    pixels, labels = data if isinstance(data, tuple) else (data, None)
    labels = None if labels is None else np.asarray(labels)
    data = array_data(np.asarray(pixels), labels, name=name, num_classes=network.num_classes)
  if tuple(data.image_shape) != tuple(network.image_shape):
    shapes = ["x".join(map(str, shape)) for shape in (network.image_shape, data.image_shape)]
    raise DataError(f"{name}: {network.name} takes images of {shapes[0]}, found {shapes[1]}")
  return data


def _method(calibration: str | Method) -> Method:
  if isinstance(calibration, Method):
    return calibration
  if calibration not in METHODS:
    raise KwjaxError(f"unknown calibration {calibration!r}; known: {', '.join(METHODS)}, or a Method")
  return METHODS[calibration]


def _given(
  network: Network, images: Images, num_images: int | None, held_out: int | None, chosen: Sizes, key: jax.Array
) -> tuple[SampleSet, int]:
  """Images in a random order, so that the held-out ones are like the others; and how many of them are used."""
  data = as_data(network, images, "images")
  if held_out is None:
    held_out = min(chosen.held_out, len(data) // 4)
  if num_images is None:
    most = len(data) - held_out
    num_images = min(chosen.images, most) if isinstance(images, (ImageData, str)) else most
  total = num_images + held_out
  if num_images < 1 or total > len(data):
    raise KwjaxError(
      f"images holds {len(data)}, too few for {num_images} to calibrate with and {held_out} to hold out: "
      "give more, or a smaller num_images or held_out"
    )
  order = np.asarray(jax.random.permutation(key, len(data)))[:total]
  labels = np.full(total, -1) if data.labels is None else data.labels[order]
  return SampleSet(data.read(order), labels.astype(np.int32), {"seconds": np.zeros(1, np.float32)}), num_images


def _checked_baseline(
  network: Network, name: str, images: Images | SynthesisConfig, scheme: str
) -> ImageData | SynthesisConfig:
  if not re.fullmatch(r"[a-z0-9+_-]+", name) or name in _RESERVED or name == scheme:
    raise KwjaxError(f"a baseline cannot be called {name!r}: lower-case letters and digits, and not {scheme!r}")
  return images if isinstance(images, SynthesisConfig) else as_data(network, images, name)
