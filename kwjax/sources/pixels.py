"""Algorithm 1 as a source: the pixels of a batch are optimized while the student learns from them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kwjax.errors import KwjaxError
from kwjax.intercept import Forwardable
from kwjax.network import Array, Network
from kwjax.runtime.devices import parallel
from kwjax.sources.base import Batch, Metrics, Source
from kwjax.synthesis.config import SynthesisConfig
from kwjax.synthesis.pixels import SynthesisState, initial_images, initial_state, synthesis_step, target_labels


class PixelsState(NamedTuple):
  """A batch on its way.

  Attributes:
    pixels: the images and their Adam moments.
    labels: i32[n], classes that the objective aims at.
  """

  pixels: SynthesisState
  labels: Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Pixels(Source[PixelsState]):
  """One batch of images under optimization; each step of the student is also a step of Algorithm 1.

  A term of the objective may look at the student, `Evidence.student_logits`: with one that rewards disagreement this is
  Adaptive DeepInversion. After `config.steps` steps the images start anew.

  Attributes:
    config: objective, schedule and number of images, `batch_size`, which is also that of the student.
    image_shape: (h, w, c).
    num_classes: of the teacher.

  Source: Haroush et al. (2020), Algorithm 1; Yin et al. (2020) for a student in the loop.
  """

  has_rows = True

  config: SynthesisConfig
  image_shape: tuple[int, int, int]
  num_classes: int

  @classmethod
  def of(cls, teacher: Network, config: SynthesisConfig) -> Pixels:
    """The images that `config` makes of a teacher.

    Raises:
      KwjaxError: the scheme optimizes nothing.
    """
    if not config.is_optimized:
      raise KwjaxError(f"the scheme {config.scheme!r} optimizes no pixels: take FreshNoise")
    return cls(config, teacher.image_shape, teacher.num_classes)

  @property
  def phase_steps(self) -> int:
    """Steps until the images start anew."""
    return max(self.config.steps, 1)

  def init(self, key: Array) -> PixelsState:
    """The starting point of Algorithm 1 and its targets; of a PRNG key."""
    image_key, label_key = jax.random.split(key)
    config = self.config
    images = initial_images(config, image_key, config.batch_size, self.image_shape)
    labels = target_labels(config, label_key, config.batch_size, self.num_classes)
    return PixelsState(initial_state(config, images), jnp.asarray(labels))

  def draw(self, state: PixelsState, key: Array, n: int, axis_name: str | None = None) -> Batch:
    """The images as they are, in [0,1], with their targets.

    Args:
      state: of this source.
      key: PRNG key; nothing is drawn with it.
      n: must be `config.batch_size`.
      axis_name: mapped axis of the devices.

    Raises:
      KwjaxError: another number of images is asked for.
    """
    del key, axis_name
    if n != self.config.batch_size:
      raise KwjaxError(f"{self.config.batch_size} images are optimized, and the student takes batches of {n}")
    return Batch(jnp.clip(state.pixels.images, 0.0, 1.0), jax.nn.one_hot(state.labels, self.num_classes))

  def update(
    self, state: PixelsState, key: Array, teacher: Network, student: Forwardable, axis_name: str | None = None
  ) -> tuple[PixelsState, Metrics]:
    """One step of Algorithm 1; metrics are the loss, every term and the J_KL of the views.

    Args:
      state: before the step.
      key: PRNG key of the step.
      teacher: the trained network.
      student: what `Evidence.student_logits` are from.
      axis_name: mapped axis of the devices.
    """
    weights = parallel.padding_weights(self.config.batch_size, axis_name)
    pixels, metrics = synthesis_step(
      state.pixels, state.labels, teacher, key, self.config, weights, student=student, axis_name=axis_name
    )
    return state._replace(pixels=pixels), {name: value for name, value in metrics.items() if name != "layers"}

  def refresh(self, state: PixelsState, key: Array, teacher: Any, student: Any) -> PixelsState:
    """Other images from the start, but for those that have not begun.

    Args:
      state: of this source.
      key: PRNG key of the phase.
      teacher: not looked at.
      student: not looked at.
    """
    del teacher, student
    return state if int(state.pixels.step) == 0 else self.init(key)
