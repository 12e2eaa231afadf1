"""Networks with the sets of images they are shown: real ones, noise and attacked ones; what is measured on each, once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments._harness.image_sets import Source, digest, identity, short_name
from experiments._harness.study_options import Missing
from kwjax.analysis.attacks import fgsm_images
from kwjax.analysis.divergence_scores import ScoreReference, divergence_scores, fit_scores
from kwjax.analysis.roc import max_softmax
from kwjax.batchnorm import bns_loss, observe, reference_moments
from kwjax.compression.images import similarity
from kwjax.compression.workspace import GAUSSIAN_KEY, Workspace, stream_key
from kwjax.errors import KwjaxError
from kwjax.network import Network, fingerprint
from kwjax.runtime.data import ImageData
from kwjax.runtime.devices import processes
from kwjax.runtime.evaluate import predict
from kwjax.synthesis import gaussian_images

TRAIN, RANDOM, GAUSSIAN, FGSM = "train", "random", "gaussian", "fgsm"
EPSILON = 0.1  # of FGSM, in normalized space
GROUP = 16
DIVERGENCE, FITTED, FITTED_BNS, SOFTMAX = "divergence", "fitted", "fitted-bns", "max-softmax"
GROUPS = f"J_KL-{GROUP}"
SCORES = (DIVERGENCE, FITTED, FITTED_BNS, GROUPS, SOFTMAX)
# Streams of a seed's key; those of the stages that all experiments share are below ten.
_DRAW_KEY, _RANDOM_KEY, _GROUP_KEY = range(40, 43)


class ImageSet(NamedTuple):
  """A set of images as one network sees it.

  Attributes:
    name: row of the tables.
    settings: everything but the seed that the images depend on, without the network.
    description: for a protocol.
    size: number of images.
    seeded: whether the images depend on the seed.
    labelled: whether they have classes.
    read: `seed -> (f32[n,h,w,c], i32[n] or None)`.
  """

  name: str
  settings: Mapping[str, Any]
  description: str
  size: int
  seeded: bool
  labelled: bool
  read: Callable[[int], tuple[np.ndarray, np.ndarray | None]]


def real_set(name: str, data: ImageData, limit: int | None) -> ImageSet:
  """A data set, or images of it drawn at random where it has more than `limit`."""
  count = len(data) if limit is None else min(limit, len(data))

  def read(seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    chosen = np.arange(count)
    if count < len(data):
      order = jax.random.permutation(stream_key(seed, _DRAW_KEY), len(data))
      chosen = np.sort(np.asarray(order)[:count])
    return data.read(chosen), None if data.labels is None else data.labels[chosen]

  settings = {"data": identity(data), "count": count}
  description = f"{count} images of {short_name(data)}"
  return ImageSet(name, settings, description, count, count < len(data), data.labels is not None, read)


def noise_sets(network: Network, count: int) -> tuple[ImageSet, ImageSet]:
  """`count` images of uniform pixels in [0, 1], and of pixels N(0, 1) in the network's normalized space."""
  shape = network.image_shape

  def uniform(seed: int) -> tuple[np.ndarray, None]:
    return np.asarray(jax.random.uniform(stream_key(seed, _RANDOM_KEY), (count, *shape))), None

  def normal(seed: int) -> tuple[np.ndarray, None]:
    key = stream_key(seed, GAUSSIAN_KEY)
    return np.asarray(gaussian_images(key, count, shape, network.input_mean, network.input_std)), None

  return (
    ImageSet(RANDOM, {"uniform": count}, f"{count} images of uniform pixels", count, True, False, uniform),
    ImageSet(GAUSSIAN, {"normal": count}, f"{count} images of N(0, 1) in normalized space", count, True, False, normal),
  )


@dataclasses.dataclass(frozen=True)
class Subject:
  """A network with what it is shown.

  Attributes:
    name: column of the tables.
    network: the network.
    own: name of the set it belongs to.
    sets: the sets that it can be shown, its own among them, `train` where given.
    absent: why it cannot be shown another, `{set: sentence}`.
    made: images made out of it, for `fitted-bns`.
  """

  name: str
  network: Network
  own: str
  sets: Mapping[str, ImageSet]
  absent: Mapping[str, str]
  made: Source

  def images(self, name: str) -> ImageSet:
    """A set by its name; that of attacked images has the settings of the network's own.

    Raises:
      Missing: it was not given, or does not fit the network.
    """
    if name == FGSM:
      own = self.images(self.own)
      if not own.labelled:
        raise Missing(f"FGSM needs labels, but the {own.description} have none")
      settings = {"fgsm": EPSILON, "of": own.settings}
      return own._replace(name=FGSM, settings=settings, description=f"FGSM of {EPSILON} on {own.description}")
    if name not in self.sets:
      raise Missing(self.absent[name])
    return self.sets[name]

  @functools.cached_property
  def identity(self) -> str:
    """Checksum of the network."""
    return fingerprint(self.network)

  def settings(self, *names: str) -> dict[str, Any]:
    """What numbers of this network on some sets depend on.

    Raises:
      Missing: as `images`.
    """
    return {"network": self.identity, "sets": [self.images(name).settings for name in names]}

  def pixels(self, workspace: Workspace, name: str, seed: int) -> np.ndarray:
    """Images f32[n,h,w,c] of a set, those of `fgsm` may leave [0, 1] by the step."""
    found, labels = self.images(name).read(seed)
    if name != FGSM or labels is None:
      return found
    return fgsm_images(self.network, found, labels, EPSILON, batch_size=self._batch, devices=workspace.group)

  def jkl(self, workspace: Workspace, name: str, seed: int) -> dict[str, Any]:
    """J_KL of a set without the input (`value`), with it, and by layer; measured once.

    Raises:
      KwjaxError: the network has no BatchNorm.
    """

    def compute() -> dict[str, Any]:
      found = similarity(workspace._replace(network=self.network), self.pixels(workspace, name, seed))
      if found is None:
        raise KwjaxError(f"network {self.name} has no BatchNorm, so there is no J_KL")
      return {"value": found["without_input"], "with_input": found["jkl"], "per_layer": found["per_layer"]}

    return workspace.results.once(self._stage("jkl", name, seed), compute)

  def scores(self, workspace: Workspace, kind: str, name: str, seed: int) -> np.ndarray:
    """One number for every image of a set, or every group: the higher, the less it looks like the network's own; once.

    Raises:
      Missing: the score needs images that were not given, or more of them.
    """

    def compute() -> list[float]:
      workspace.stop_if_asked()
      images = self.pixels(workspace, name, seed)
      if kind == GROUPS:
        return self._of_groups(workspace, images, seed)
      where: dict[str, Any] = {
        "batch_size": self._batch,
        "devices": workspace.group,
        "should_stop": workspace.should_stop,
      }
      if kind == SOFTMAX:
        found = np.asarray(max_softmax(processes.gather(predict(self.network, images, **where))))
      else:
        reference = None if kind == DIVERGENCE else self._reference(workspace, kind, seed)
        found = divergence_scores(self.network, images, reference=reference, **where)
      return [float(value) for value in found]

    return np.asarray(workspace.results.once(self._stage(kind, name, seed), compute))

  def is_seeded(self, kind: str, name: str) -> bool:
    """Whether a score of a set depends on the seed."""
    draws = (FITTED_BNS, GROUPS) if kind != FITTED or not self.images(TRAIN).seeded else (FITTED,)
    return kind in draws or self.images(name).seeded

  def score_settings(self, kind: str) -> Any:
    """What a score depends on beside the network and the images it is given.

    Raises:
      Missing: it needs images that were not given.
    """
    if kind == FITTED:
      return self.images(TRAIN).settings
    return self.made.settings if kind == FITTED_BNS else GROUP if kind == GROUPS else None

  def _reference(self, workspace: Workspace, kind: str, seed: int) -> ScoreReference:
    """How the divergences of the network's training images, or of those made out of it, are distributed."""

    def compute() -> dict[str, Any]:
      if kind == FITTED:
        images = self.pixels(workspace, TRAIN, seed)
      else:
        images = self.made.images(workspace._replace(network=self.network), seed)
      found = fit_scores(
        self.network, images, batch_size=self._batch, devices=workspace.group, should_stop=workspace.should_stop
      )
      return {"layers": list(found.layers), "mean": found.mean.tolist(), "precision": found.precision.tolist()}

    name = f"reference/{digest([self.identity, kind, self.score_settings(kind)])}-seed{seed}"
    found = workspace.results.once(name, compute)
    return ScoreReference(tuple(found["layers"]), np.asarray(found["mean"]), np.asarray(found["precision"]))

  def _of_groups(self, workspace: Workspace, images: np.ndarray, seed: int) -> list[float]:
    """J_KL of disjoint groups of images in random order: sets are often sorted by class."""
    order = np.asarray(jax.random.permutation(stream_key(seed, _GROUP_KEY), len(images)))
    found = []
    for first in range(0, len(order) - GROUP + 1, GROUP):
      workspace.stop_if_asked()
      found.append(float(group_jkl(self.network, images[order[first : first + GROUP]])))
    return found

  def _stage(self, kind: str, name: str, seed: int) -> str:
    which = seed if self.is_seeded(kind, name) else 0
    return f"sets/{name}/{kind}-{digest([self.settings(name), self.score_settings(kind)])}-seed{which}"

  @property
  def _batch(self) -> int:
    return 256 if self.network.image_shape[0] <= 64 else 32


@jax.jit
def group_jkl(network: Network, images: jax.Array) -> jax.Array:
  """J_KL f32[] of a few images f32[b,h,w,c] in [0,1], without the input: `kwjax.measure` for very many small sets."""
  with jax.default_matmul_precision("highest"):
    _, measured = observe(network, images)
    return bns_loss(reference_moments(network), measured)
