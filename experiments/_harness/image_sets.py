"""Where the images of a study come from: real ones, or those that a scheme makes; with what is derived from them."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments._harness import stages
from experiments._harness.options import Sizes
from experiments._harness.stages import CALIBRATION_KEY, GAUSSIAN_KEY, REAL_KEY, SYNTHESIS_KEY, Site
from kwjax.network import Network, fingerprint
from kwjax.quantization import QuantizedNetwork, QuantRules
from kwjax.runtime.data import ImageData
from kwjax.runtime.files import canonical_json, sha256_file
from kwjax.synthesis import SynthesisConfig

_SAMPLED = 32


def digest(value: Any) -> str:
  """Twelve hexadecimal digits that stand for a JSON-able value in the name of a file."""
  return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]


def identity(data: ImageData) -> dict[str, Any]:
  """What tells one data set from another wherever it lies: number, shape, labels, some images, the file it is in."""
  chosen = np.linspace(0, len(data) - 1, min(_SAMPLED, len(data))).round().astype(int)
  found = hashlib.sha256(np.ascontiguousarray(data.read(chosen)).tobytes())
  if data.labels is not None:
    found.update(np.ascontiguousarray(data.labels).tobytes())
  path = pathlib.Path(data.name.removesuffix(":train").removesuffix(":test"))
  whole = sha256_file(path)[:16] if path.is_file() else None
  return {"count": len(data), "shape": data.image_shape, "sample": found.hexdigest()[:16], "file": whole}


def short_name(data: ImageData) -> str:
  """The name of a data set without the folders it lies in, which differ from machine to machine."""
  return pathlib.PurePath(data.name).name


class Source(NamedTuple):
  """A set of images.

  Attributes:
    name: "real", or a scheme.
    settings: everything but the seed that the images depend on, the network included.
    words: how they are made, for a protocol.
    images: `(site, seed) -> f32[n,h,w,c]`; synthesized ones are kept in the run's folder and made once.
  """

  name: str
  settings: Mapping[str, Any]
  words: str
  images: Callable[[Site, int], np.ndarray]

  def stage(self, kind: str, seed: int) -> str:
    """Name of a folder or of a stage that belongs to these images."""
    return f"{kind}/{self.name}-{digest(self.settings)}-seed{seed}"


def synthesized(network: Network, config: SynthesisConfig, count: int) -> Source:
  """`count` images that a scheme makes out of a network; of equal seeds, the same in every study."""
  settings = {"network": fingerprint(network), "config": config.to_json(), "count": count}
  steps = f", {config.steps} steps" if config.is_optimized else ""

  def images(site: Site, seed: int) -> np.ndarray:
    key = stages.stream_key(seed, SYNTHESIS_KEY if config.is_optimized else GAUSSIAN_KEY)
    return stages.make_images(site, config, made.stage("synthesis", seed), count=count, key=key).images

  made = Source(config.scheme, settings, f"{count} {config.scheme} images{steps}", images)
  return made


def real(network: Network, data: ImageData, count: int) -> Source:
  """Up to `count` images of a data set, drawn anew for each seed, equally many a class where it has labels."""
  settings = {"network": fingerprint(network), "data": identity(data), "count": count}

  def images(site: Site, seed: int) -> np.ndarray:
    return stages.drawn_images(data, count, stages.stream_key(seed, REAL_KEY))

  return Source(stages.REAL, settings, f"{min(count, len(data))} real images of {short_name(data)}", images)


def calibrated(
  site: Site, source: Source, rules: QuantRules, chosen: Sizes, seed: int, *, images: np.ndarray | None = None
) -> QuantizedNetwork:
  """The low-precision copy calibrated with a source: Haroush et al. (2020), section 4.2.

  Args:
    site: where.
    source: of the images.
    rules: bits of every layer.
    chosen: how many of the images are used (`images`), and the draws.
    seed: of the images and of the draws.
    images: those of the source, where they are at hand.
  """
  used = (source.images(site, seed) if images is None else images)[: chosen.images]
  table = stages.range_table(site, f"{source.stage('ranges', seed)}-{len(used)}", used, words=source.name)
  return stages.calibrated(site.network, table, rules, chosen, key=stages.stream_key(seed, CALIBRATION_KEY))
