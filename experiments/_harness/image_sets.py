"""Where the images of a study come from: real ones, or those that a scheme makes; with what is derived from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from kwjax.compression.images import make_images
from kwjax.compression.settings import Sizes
from kwjax.compression.student import range_table
from kwjax.compression.workspace import (
  CALIBRATION_KEY,
  GAUSSIAN_KEY,
  REAL,
  REAL_KEY,
  SYNTHESIS_KEY,
  Workspace,
  stream_key,
)
from kwjax.network import Network, fingerprint
from kwjax.quantization import QuantizedNetwork, QuantRules, RangeTable, quantize, ranges_from
from kwjax.runtime.data import ImageData
from kwjax.runtime.identity import digest, identity, short_name
from kwjax.synthesis import SynthesisConfig


class Source(NamedTuple):
  """A set of images.

  Attributes:
    name: "real", or a scheme.
    settings: everything but the seed that the images depend on, the network included.
    description: how they are made, for a protocol.
    images: `(workspace, seed) -> f32[n,h,w,c]`; synthesized ones are kept in the run's folder and made once.
  """

  name: str
  settings: Mapping[str, Any]
  description: str
  images: Callable[[Workspace, int], np.ndarray]

  def stage(self, kind: str, seed: int) -> str:
    """Name of a folder or of a stage that belongs to these images."""
    return f"{kind}/{self.name}-{digest(self.settings)}-seed{seed}"


def synthesized(network: Network, config: SynthesisConfig, count: int) -> Source:
  """`count` images that a scheme makes out of a network; of equal seeds, the same in every study."""
  settings = {"network": fingerprint(network), "config": config.to_json(), "count": count}
  steps = f", {config.steps} steps" if config.is_optimized else ""

  def images(workspace: Workspace, seed: int) -> np.ndarray:
    key = stream_key(seed, SYNTHESIS_KEY if config.is_optimized else GAUSSIAN_KEY)
    return make_images(workspace, config, made.stage("synthesis", seed), count=count, key=key).images

  made = Source(config.scheme, settings, f"{count} {config.scheme} images{steps}", images)
  return made


def real(network: Network, data: ImageData, count: int) -> Source:
  """Up to `count` images of a data set, drawn anew for each seed, equally many a class where it has labels."""
  settings = {"network": fingerprint(network), "data": identity(data), "count": count}

  def images(workspace: Workspace, seed: int) -> np.ndarray:
    return drawn_images(data, count, stream_key(seed, REAL_KEY))

  return Source(REAL, settings, f"{min(count, len(data))} real images of {short_name(data)}", images)


def calibrated(
  workspace: Workspace, source: Source, rules: QuantRules, chosen: Sizes, seed: int, *, images: np.ndarray | None = None
) -> QuantizedNetwork:
  """The quantized network calibrated with a source: Haroush et al. (2020), section 4.2.

  Args:
    workspace: where.
    source: of the images.
    rules: bits of every layer.
    chosen: how many of the images are used (`images`), and the draws.
    seed: of the images and of the draws.
    images: those of the source, where they are at hand.
  """
  used = (source.images(workspace, seed) if images is None else images)[: chosen.images]
  table = range_table(workspace, f"{source.stage('ranges', seed)}-{len(used)}", used, description=source.name)
  return quantized(workspace.network, table, rules, chosen, key=stream_key(seed, CALIBRATION_KEY))


def quantized(
  network: Network, table: RangeTable, rules: QuantRules, chosen: Sizes, *, key: jax.Array
) -> QuantizedNetwork:
  """The quantized network whose activation ranges are drawn from a table of extremes.

  Args:
    network: the float network.
    table: of `kwjax.compression.student.range_table`.
    rules: bits of every layer.
    chosen: its `calibration_steps` and `calibration_batch`.
    key: of the draws.
  """
  steps, batch_size = chosen.calibration_steps, chosen.calibration_batch
  return quantize(network, rules, ranges_from(table, rules, key=key, steps=steps, batch_size=batch_size))


def drawn_images(data: ImageData, count: int, key: jax.Array) -> np.ndarray:
  """Up to `count` different images f32[n,h,w,c] of a data set, drawn at random, equally many a class where it has labels."""
  return data.read(drawn_indices(data, count, key))


def drawn_indices(data: ImageData, count: int, key: jax.Array) -> np.ndarray:
  """Which images `drawn_images` reads, in its order; i[n]."""
  order = np.asarray(jax.random.permutation(key, len(data)))
  if data.labels is not None:
    labels = data.labels[order]
    rank = np.zeros(len(labels), int)
    for label in np.unique(labels):
      rank[labels == label] = np.arange(np.sum(labels == label))
    order = order[np.argsort(rank, kind="stable")]
  return order[:count]
