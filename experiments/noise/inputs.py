"""Noise as the images of a study: Gaussian pixels, or dead leaves."""

from __future__ import annotations

import numpy as np

from experiments._harness.image_sets import Source, synthesized
from kwjax.compression.workspace import GAUSSIAN, GAUSSIAN_KEY, Workspace, stream_key
from kwjax.network import Network, fingerprint
from kwjax.synthesis import SynthesisConfig, dead_leaves

LEAVES = "dead_leaves"
NOISES = (GAUSSIAN, LEAVES)


def noise(network: Network, name: str, count: int) -> Source:
  """`count` images of noise in the shape of a network's inputs.

  Args:
    network: what will see them.
    name: one of NOISES: "gaussian", N(0, 1) in the network's normalized input space, or "dead_leaves", mixed shapes whose
      colours are uniform in [0, 1].
    count: distinct images.
  """
  if name == GAUSSIAN:
    return synthesized(network, SynthesisConfig.preset(GAUSSIAN), count)
  settings = {"network": fingerprint(network), "noise": name, "count": count}

  def images(workspace: Workspace, seed: int) -> np.ndarray:
    devices = workspace.group.local.devices
    return np.asarray(dead_leaves(stream_key(seed, GAUSSIAN_KEY), count, network.image_shape, devices=devices))

  return Source(name, settings, f"{count} {name} images", images)
