"""The toy problem's plane: circles, noise elsewhere, and perceptrons that tell the circles apart."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from kwjax.compression.workspace import GAUSSIAN_KEY, stream_key
from kwjax.network import Array, Network
from kwjax.runtime.evaluate import predict
from kwjax.training import TrainConfig, initial_variables, train

RADII, THICKNESS = (0.35, 1.0), 0.08
REACH = 2.0
"""Half of the side of the square that the pixels' [0, 1] stands for."""
SHOWN, GRID = 1.6, 64
"""Half of the side of the square that regions are looked at in, and points a side of it."""

DATA = "data"
_IMAGE_SHAPE = (1, 1, 2)
_TRAIN_KEY, _WEIGHTS_KEY = 101, 102


class Noise(NamedTuple):
  """Gaussian noise in the plane, in standard deviations of the circles; shifted to the right."""

  scale: float
  shift: float


NOISES = {"matched": Noise(1.0, 0.0), "narrow": Noise(0.1, 0.0), "wide": Noise(5.0, 0.0), "shifted": Noise(1.0, 3.0)}


class Sizes(NamedTuple):
  """How much of everything."""

  points: int
  training_steps: int
  distillation_steps: int
  batch_size: int


class Perceptron(nn.Module):
  """Two hidden layers, each followed by BatchNorm and ReLU: f32[b,1,1,2] -> logits f32[b,classes].

  Attributes:
    num_classes: number of logits.
    width: of the hidden layers.
  """

  num_classes: int = 2
  width: int = 32

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Logits of normalized points; `train` makes BatchNorm use the batch."""
    x = x.reshape(x.shape[0], -1)
    for index in range(2):
      x = nn.Dense(self.width, use_bias=False, name=f"dense{index}")(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"bn{index}")(x))
    return nn.Dense(self.num_classes, name="classifier")(x)


def circles(seed: int, count: int, *, held_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
  """Points f64[n,2] of two concentric circles with Gaussian thickness, evenly many each, and which they are on, i64[n].

  Args:
    seed: of the points.
    count: n.
    held_out: other points of the same circles.
  """
  rng = np.random.default_rng([seed, held_out])
  labels = np.arange(count) % len(RADII)
  angles, radii = rng.uniform(0, 2 * np.pi, count), np.asarray(RADII)[labels] + THICKNESS * rng.standard_normal(count)
  return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1), labels


def as_images(points: Any) -> np.ndarray:
  """Points [n,2] of the plane as images f32[n,1,1,2]; the square of half side 2 is [0,1]."""
  return (np.asarray(points) / (2 * REACH) + 0.5).astype(np.float32).reshape(-1, *_IMAGE_SHAPE)


def grid_points() -> np.ndarray:
  """f64[grid^2, 2], the square that the figure shows, row by row from below."""
  line = (np.arange(GRID) + 0.5) / GRID * 2 * SHOWN - SHOWN
  x, y = np.meshgrid(line, line)
  return np.stack([x.ravel(), y.ravel()], axis=1)


def as_points(images: Any) -> np.ndarray:
  """Undoes `as_images`: f64[n,2]."""
  return (np.asarray(images, float).reshape(-1, 2) - 0.5) * 2 * REACH


def untrained(seed: int, number: int) -> Network:
  """A perceptron with random weights; its inputs are normalized by the circles' mean, 0, and standard deviation.

  Args:
    seed: of a run.
    number: tells its networks apart.
  """
  # Per axis: half of the mean squared radius.
  deviation = float(np.sqrt((np.mean(np.square(RADII)) + THICKNESS**2) / 2)) / (2 * REACH)
  variables = initial_variables(Perceptron(), _IMAGE_SHAPE, key=stream_key(seed, _WEIGHTS_KEY + number))
  return Network(
    Perceptron(), variables, image_shape=_IMAGE_SHAPE, input_mean=[0.5] * 2, input_std=[deviation] * 2, name="circles"
  )


@functools.lru_cache(maxsize=4)
def teacher(seed: int, sizes: Sizes) -> Network:
  """The perceptron that was trained on the circles of a seed."""
  points, labels = circles(seed, sizes.points)
  config = TrainConfig(steps=sizes.training_steps, batch_size=sizes.batch_size, learning_rate=0.1)
  images = np.clip(as_images(points), 0.0, 1.0)
  return train(untrained(seed, 0), images, labels, config, key=stream_key(seed, _TRAIN_KEY))


def inputs(row: str, network: Network, seed: int, count: int) -> np.ndarray:
  """Images f32[n,1,1,2] that a student learns from: those of a noise, or the circles."""
  if row == DATA:
    return as_images(circles(seed, count)[0])
  noise = NOISES[row]
  z = np.asarray(jax.random.normal(stream_key(seed, GAUSSIAN_KEY), (count, *_IMAGE_SHAPE)))
  z = noise.scale * z + np.asarray([noise.shift, 0.0])
  return (np.asarray(network.input_mean) + np.asarray(network.input_std) * z).astype(np.float32)


def classes_of(network: Network, points: Any) -> np.ndarray:
  """Which circle a network sees at each point, i64[n]."""
  return predict(network, as_images(points), batch_size=4096).argmax(axis=1)
