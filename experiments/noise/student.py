"""One student that learned a teacher's answers to noise: how it is trained, and what its accuracy is measured with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from experiments._harness.accuracy import top1
from experiments._harness.image_sets import digest, identity, short_name
from kwjax.batchnorm import adjust_statistics, current_layers, observing, weigh
from kwjax.compression.workspace import DISTILL_KEY, GAUSSIAN_KEY, Workspace, stream_key
from kwjax.distillation import DistillConfig, distill
from kwjax.models import get_model
from kwjax.network import Network
from kwjax.runtime.data import ImageData
from kwjax.runtime.devices.forwarding import forward_batches
from kwjax.runtime.reporting.messages import log
from kwjax.sources import FreshNoise
from kwjax.synthesis import dead_leaves, gaussian_images
from kwjax.training import initial_variables

GAUSSIAN, DEAD_LEAVES = NOISES = ("gaussian", "dead_leaves")
Space = Literal["normalized", "pixel"]
Evaluation = Literal["adjusted", "current", "own"]
_WORDS = {
  "adjusted": "with statistics of these images, pooled over batches of {batch}",
  "current": "with the statistics of each batch of {batch} of them",
  "own": "with the statistics that it learned from noise",
}
# A grey of the middle of the range: what is known of images of which nothing is known.
_PIXEL_MEAN, _PIXEL_STD = 0.5, 0.25
_WEIGHTS_KEY, _LAYERS_KEY = 101, 102


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a student is made and judged, all but the seed.

  Attributes:
    teacher: fingerprint of the network that answers.
    student: its name on the command line.
    arch: its registered name.
    model_options: attributes of its module.
    noise: one of `NOISES`.
    shapes: of dead leaves.
    space: of Gaussian noise: N(0, 1) in the teacher's normalized input space, or N(1/2, 1/4^2) clipped to [0, 1].
    pool: number of noise images that are seen again every epoch; None: every step draws its own.
    running_fraction: share of the teacher's BatchNorm layers on running statistics.
    config: of the distillation, without those layers.
    evaluation: labelled images.
    judged: which statistics of the student the accuracy of a cell is measured with.
  """

  teacher: str
  student: str
  arch: str
  model_options: Mapping[str, Any]
  noise: str
  shapes: str
  space: Space
  pool: int | None
  running_fraction: float
  config: DistillConfig
  evaluation: ImageData
  judged: Evaluation

  @property
  def trained(self) -> dict[str, Any]:
    """Settings that the student and its accuracies depend on."""
    noise = f"{self.noise} in pixel space" if self.noise == GAUSSIAN and self.space == "pixel" else self.noise
    return {
      "teacher": self.teacher,
      "student": [self.arch, dict(self.model_options)],
      "noise": [noise, self.pool or "fresh", self.shapes if self.noise == DEAD_LEAVES else ""],
      "running_fraction": self.running_fraction,
      "distillation": self.config.to_json(),
      "evaluation": identity(self.evaluation),
    }

  @property
  def settings(self) -> dict[str, Any]:
    """Settings that the value of a cell depends on."""
    return self.trained if self.judged == "adjusted" else {**self.trained, "judged": self.judged}

  @property
  def description(self) -> str:
    """The same for people."""
    config = self.config
    space = f" in {self.space} space" if self.noise == GAUSSIAN else ""
    images = f"{self.noise} images{space}"
    source = f"{images} drawn anew at every step" if self.pool is None else f"a pool of {self.pool} {images}"
    temperature = "" if config.temperature == 1.0 else f", temperature {config.temperature:g}"
    schedule: str = config.schedule
    if schedule == "plateau":
      schedule = f"plateau of the loss ({config.plateau_patience} x {config.plateau_steps} steps)"
    return (
      f"{self.student} from scratch, {config.steps} steps of {config.batch_size} from {source}, {config.algorithm} "
      f"{config.learning_rate:g}, {schedule}{temperature}; teacher: {self.running_fraction:.0%} of the BatchNorm layers on "
      f"running statistics; top-1 on {len(self.evaluation)} images of {short_name(self.evaluation)} "
      + _WORDS[self.judged].format(batch=config.batch_size)
    )

  def measure(self, workspace: Workspace, seed: int) -> Mapping[str, Any]:
    """`{"value": top-1, ...}` with the accuracies by all statistics; one student serves every `judged`."""
    stage = f"students/{digest(self.trained)}/seed-{seed}"
    found = workspace.results.once(stage, lambda: self._train_and_judge(workspace, seed))
    return {"value": found[self.judged], **found}

  def _train_and_judge(self, workspace: Workspace, seed: int) -> dict[str, Any]:
    layers = current_layers(workspace.network, self.running_fraction, stream_key(seed, _LAYERS_KEY))
    workspace.stop_if_asked()
    student = distill(
      self._student(workspace.network, seed),
      workspace.network,
      self._fresh(workspace.network) if self.pool is None else self._pool(workspace, self.pool, seed),
      self.config.replace(current=layers, checkpoint_every=workspace.checkpoint_steps),
      key=stream_key(seed, DISTILL_KEY),
      workdir=workspace.scratch,
      devices=workspace.group,
      progress=True,
    )
    images, batch = self.evaluation.read(np.arange(len(self.evaluation))), self.config.batch_size
    adjusted = top1(
      workspace, adjust_statistics(student, images, batch_size=batch, devices=workspace.group), self.evaluation
    )
    return {
      "adjusted": adjusted["value"],
      "current": current_top1(workspace, student, self.evaluation, batch),
      "own": top1(workspace, student, self.evaluation)["value"],
      "count": adjusted["count"],
      "layers": list(layers),
    }

  def _student(self, teacher: Network, seed: int) -> Network:
    """With random weights, on the teacher's inputs."""
    model_options = {"num_classes": teacher.num_classes, **self.model_options}
    module = get_model(self.arch, **model_options)
    return Network(
      module,
      initial_variables(module, teacher.image_shape, key=stream_key(seed, _WEIGHTS_KEY)),
      image_shape=teacher.image_shape,
      input_mean=teacher.input_mean,
      input_std=teacher.input_std,
      name=self.student,
      arch=self.arch,
      model_options=model_options,
    )

  def _gaussian(self, teacher: Network) -> tuple[Sequence[float], Sequence[float], bool]:
    """Mean, standard deviation, and whether values are clipped."""
    if self.space == "normalized":
      return teacher.input_mean, teacher.input_std, False
    channels = teacher.image_shape[2]
    return (_PIXEL_MEAN,) * channels, (_PIXEL_STD,) * channels, True

  def _fresh(self, teacher: Network) -> FreshNoise:
    if self.noise == DEAD_LEAVES:
      return FreshNoise.dead_leaves(teacher.image_shape, shapes=self.shapes)
    mean, std, clip = self._gaussian(teacher)
    return FreshNoise.gaussian(teacher.image_shape, mean, std, clip=clip)

  def _pool(self, workspace: Workspace, count: int, seed: int) -> np.ndarray:
    """f32[n,h,w,c], or u8 for dead leaves, whose colours are in [0, 1]."""
    log(f"making {count} {self.noise} images")
    key, teacher = stream_key(seed, GAUSSIAN_KEY), workspace.network
    if self.noise == GAUSSIAN:
      mean, std, clip = self._gaussian(teacher)
      return np.asarray(gaussian_images(key, count, teacher.image_shape, mean, std, clip=clip))
    devices = workspace.group.local.devices
    images = dead_leaves(key, count, teacher.image_shape, shapes=self.shapes, devices=devices)
    return np.round(np.asarray(images) * 255.0).astype(np.uint8)


def current_top1(workspace: Workspace, network: Network, data: ImageData, batch_size: int) -> float:
  """Top-1 with every BatchNorm layer on the statistics of the batch.

  Args:
    workspace: where.
    network: with BatchNorm.
    data: labelled images, cut into batches as equal as possible.
    batch_size: most images in a batch.
  """
  assert data.labels is not None
  batches = forward_batches(
    _current_logits,
    network,
    data,
    batch_size=batch_size,
    description="evaluation",
    devices=1,
    should_stop=workspace.should_stop,
  )
  logits = np.concatenate([found[0] for found, _ in batches])
  return float(np.mean(logits.argmax(-1) == data.labels))


def _current_logits(network: Network, images: jax.Array, weights: jax.Array | None, axis_name: str | None) -> jax.Array:
  variables = network.variables if weights is None else weigh(network.variables, weights)
  apply = observing(network.forward, axis_name=axis_name, current=(".*",), record_moments=False)
  return apply(variables, images)[0]
