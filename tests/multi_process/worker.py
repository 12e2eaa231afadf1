"""What one process of a test run does."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import optax

from kwjax.analysis.similarity import measure
from kwjax.cli.command import run_command
from kwjax.distillation import DistillConfig, distill, distill_step
from kwjax.distillation.step import initial_state
from kwjax.quantization import QuantRules, calibrate, observe_ranges, quantize
from kwjax.reconstruction import ReconstructConfig, reconstruct
from kwjax.runtime.devices import processes
from kwjax.runtime.devices.parallel import DeviceGroup, device_group, padding_weights, value_and_grad_of_shard
from kwjax.runtime.evaluate import agreement, evaluate
from kwjax.runtime.workdir import graceful_shutdown
from kwjax.sources import Pixels
from kwjax.synthesis import SynthesisConfig, synthesis_loss, synthesize
from tests.networks import tiny_network

IMAGES = np.random.default_rng(0).random((5, 8, 8, 3), dtype=np.float32)
LABELS = np.array([0, 1, 2, 3, 4], np.int32)
CONFIG = SynthesisConfig.for_network("bns", 8).replace(batch_size=6, drops=())
SEED = 3  # a key made here would touch a device before the processes have met


def filled(group: DeviceGroup, rows: np.ndarray) -> jax.Array:
  """Rows of the whole batch, filled up with copies of the first and placed on the devices."""
  index = [i if i < len(rows) else 0 for i in group.rows(len(rows))]
  return group.place(rows[index])


def image_gradient(group: DeviceGroup) -> np.ndarray:
  """Gradient of the objective with respect to the images, f32[5,8,8,3]."""

  def step(images, labels, network, key, axis_name):
    weights = padding_weights(len(IMAGES), axis_name)
    loss = lambda x: synthesis_loss(x, network, labels, key, CONFIG, weights, axis_name=axis_name)
    return value_and_grad_of_shard(loss, axis_name)(images)[1]

  network, key = group.replicate(tiny_network()), group.replicate(jax.random.key(SEED))
  gradient = group.compile(step)(filled(group, IMAGES), filled(group, LABELS), network, key)
  return processes.gather(group.unshard(gradient))[: len(IMAGES)]


def student_gradient(group: DeviceGroup) -> np.ndarray:
  """Gradient of the distillation loss with respect to all parameters, one vector."""
  config = DistillConfig(5, batch_size=5, learning_rate=0.1, iq_weight=0.0, batch_norm="train")
  teacher, student = (
    tiny_network(),
    tiny_network().replace(variables=jax.tree.map(lambda v: 0.9 * v, tiny_network().variables)),
  )

  def step(state, batch, teacher, axis_name):
    weights = padding_weights(len(IMAGES), axis_name)
    return distill_step(state, batch, teacher, config, weights, axis_name=axis_name)[0]

  state = group.replicate(initial_state(student, config))
  after = group.first(group.compile(step)(state, filled(group, IMAGES), group.replicate(teacher)))
  # Before the first step there is no momentum, so that after it the momentum is the gradient.
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(optax.tree.get(after.optimizer, "trace"))])


def numbers(devices: int) -> dict[str, np.ndarray]:
  """Everything that must not depend on how many devices and processes compute it, with odd numbers of images."""
  group, network = device_group(devices), tiny_network()
  other = network.replace(variables=jax.tree.map(lambda v: 0.95 * v, network.variables))
  images = np.random.default_rng(1).random((7, 8, 8, 3), dtype=np.float32)
  labels = np.arange(7) % 5
  similarity = measure(network, images, include_input=True, batch_size=3, devices=devices)
  table = observe_ranges(network, images, batch_size=3, devices=devices)
  alike = agreement(other, network, images, batch_size=3, devices=devices)
  samples = synthesize(network, CONFIG.replace(steps=3), num_images=7, key=jax.random.key(SEED), devices=devices)
  config = DistillConfig(2, batch_size=5, learning_rate=0.01, iq_weight=0.0)
  tuned = distill(other, network, images, config, key=jax.random.key(SEED), devices=devices)
  # Pixels and their optimizer are split over the devices, and the state that is fetched has no padding.
  source = Pixels.of(network, CONFIG.replace(steps=4, batch_size=5))
  made = distill(other, network, source, config, key=jax.random.key(SEED), devices=devices)
  # Fewer images than processes, or than devices: one process has nothing but filling.
  few = evaluate(network, images[:1], labels[:1], devices=devices)
  lone = observe_ranges(network, images[:1], devices=devices)
  pair = synthesize(network, CONFIG.replace(steps=2), num_images=2, key=jax.random.key(SEED), devices=devices)
  rules = QuantRules.parse("4w4a")
  student = quantize(
    network, rules, calibrate(network, images, rules, key=jax.random.key(SEED), steps=2, batch_size=16)
  )
  # Without dropping: what is dropped differs from device to device.
  rebuilt = reconstruct(
    student, images, ReconstructConfig(4, batch_size=4, keep=0.0), key=jax.random.key(SEED), devices=devices
  )
  return {
    "reconstructed": np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(rebuilt)]),
    "image_gradient": image_gradient(group),
    "student_gradient": student_gradient(group),
    "jkl": np.concatenate([similarity.jkl[None], *similarity.per_layer.values()]),
    "ranges": np.stack([end for ends in table.values() for end in ends]),
    "lone_range": np.stack([end for ends in lone.values() for end in ends]),
    "pair_images": pair.images,
    "accuracy": np.array([*_accuracy(network, images, labels, devices), few.top1, few.count]),
    "agreement": np.array([alike.top1, alike.kl, alike.sqnr_db, alike.count]),
    "images": samples.images,
    "labels": samples.labels,
    "loss": samples.history["loss"],
    "tuned_on_images": np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(made.variables)]),
    "tuned": np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tuned.variables)]),
  }


def _accuracy(network, images, labels, devices) -> tuple[float, int]:
  found = evaluate(network, images, labels, batch_size=3, devices=devices)
  return found.top1, found.count


def make_images(folder: pathlib.Path, steps: int) -> None:
  """A synthesis that saves its state every ten steps."""
  with graceful_shutdown() as shutdown:
    samples = synthesize(
      tiny_network(),
      CONFIG.replace(steps=steps),
      num_images=7,
      key=jax.random.key(SEED),
      workdir=folder / "images",
      devices=2,
      checkpoint_seconds=0,
      should_stop=lambda: shutdown.requested,
    )
  np.save(folder / f"images-{processes.index()}.npy", samples.images)


def main(mode: str, folder: pathlib.Path, steps: int, coordinator: str, count: int, index: int) -> None:
  """One process of a run."""
  processes.initialize(coordinator, count, index)
  if mode == "numbers":
    np.savez(folder / f"numbers-{index}.npz", **numbers(2))
  make_images(folder, steps)


def run(given: list[str]) -> int:
  """`main` with its arguments as texts; the exit status of a command."""
  mode, folder, steps, coordinator, count, index = given
  return run_command(lambda: main(mode, pathlib.Path(folder), int(steps), coordinator, int(count), int(index)))
