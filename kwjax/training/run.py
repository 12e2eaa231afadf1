"""Supervised training as a run: batches, devices, checkpoints, progress."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kwjax.distillation.batches import Feed, compiled_step, planner
from kwjax.errors import DataError, KwjaxError
from kwjax.network import Array, Network
from kwjax.runtime.data import checked_labels
from kwjax.runtime.evaluate import Devices
from kwjax.runtime.loop import History, Loop, fingerprint, open_store
from kwjax.runtime.parallel import device_group
from kwjax.training.step import TERMS, TrainConfig, TrainState, initial_state, train_step

Callback = Callable[[int, dict[str, float], Network], None]
"""`(steps done, metrics of the last one, network)`; the network's arrays are valid during the call only."""


def train(
  network: Network,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  config: TrainConfig,
  *,
  key: Array,
  workdir: str | pathlib.Path | None = None,
  devices: Devices = None,
  progress: bool = False,
  callback: Callback | None = None,
) -> Network:
  """Train a network on labelled images with cross-entropy and SGD; BatchNorm's statistics are those of all devices.

  A batch that does not divide over the devices is filled up with images of weight zero. Several processes must all make
  the same call; each forwards its share of every batch, and process 0 keeps the checkpoints.

  Args:
    network: its variables are the start, as `initial_variables` draws them or trained already.
    images: f32[n,h,w,c] in [0,1], or u8[n,h,w,c] in 0..255. Each epoch sees each of them once.
    labels: i[n], below the number of logits.
    config: how to train.
    key: PRNG key of order and augmentation; equal arguments give equal networks.
    workdir: keeps checkpoints in its folder `training`. A run that was killed at any moment and is started again with the
      same arguments ends with bit-identical weights; Ctrl-C and SIGTERM save before they stop it.
    devices: number of devices of each process, devices, or None (all accelerators, or one CPU a process).
    progress: show a progress bar.
    callback: called every `config.log_every` steps and after the last.

  Returns:
    The trained network.

  Raises:
    KwjaxError: the shape of the images does not fit, or there are fewer devices.
    DataError: there are no images, their values lie outside the range, or the labels do not fit.
    NonFiniteError: the loss or the gradient became NaN or infinite; names the step and the last good checkpoint.
    CheckpointError: `workdir` holds a run with other arguments.
    KeyboardInterrupt, SystemExit: the run was asked to stop, after its state was saved.
  """
  trained, _ = train_with_history(
    network, images, labels, config, key=key, workdir=workdir, devices=devices, progress=progress, callback=callback
  )
  return trained


def train_with_history(
  network: Network,
  images: Array | np.ndarray,
  labels: Array | np.ndarray,
  config: TrainConfig,
  *,
  key: Array,
  workdir: str | pathlib.Path | None = None,
  devices: Devices = None,
  progress: bool = False,
  callback: Callback | None = None,
) -> tuple[Network, History]:
  """As `train`; also returns the metrics of every `config.log_every`-th step and of the last: `step`, `loss`, ..."""
  group = device_group(devices)
  _check_images(network, images)
  classes = checked_labels(np.asarray(labels), len(images), network.num_classes, "the training data")
  assert classes is not None
  plan = planner(key, len(images), config)

  def settings() -> dict[str, Any]:
    return {
      "config": config.to_json(),
      "key": np.asarray(jax.random.key_data(key)).tolist(),
      "network": fingerprint(network),
      "images": fingerprint((images, classes)),
    }

  with open_store(workdir, "training", settings) as store:
    state, history = store.restore(initial_state(network, config))
    feed = Feed.of(images, plan, config.batch_size, group, config.resident_bytes)
    step_fn = compiled_step(group, train_step, config, feed.is_resident)

    def advance(step: int, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
      batch, drawn = feed.batch(step)
      return step_fn(state, batch, group.place(drawn), group.place(classes[drawn.chosen]), feed.weights)

    def on_log(step: int, metrics: dict[str, float], state: TrainState) -> None:
      if callback is not None:
        callback(step, metrics, state.network)

    loop = Loop(group, config, store, "train", f"training of {network.name}", TERMS, _summary, progress, on_log)
    state = loop.finish(state, history, advance)
  return state.network, history


def _check_images(network: Network, images: Array | np.ndarray) -> None:
  if images.ndim != 4 or tuple(images.shape[1:]) != network.image_shape:
    expected = ", ".join(map(str, network.image_shape))
    raise KwjaxError(f"images of {network.name} have shape (n, {expected}), found {tuple(images.shape)}")
  if len(images) == 0:
    raise DataError("there are no images to train on")
  if images.dtype == np.uint8:
    return
  low, high = float(images.min()), float(images.max())
  if not (low >= 0.0 and high <= 1.0):
    raise DataError(f"images must lie in [0, 1] or be uint8, found values from {low:.4g} to {high:.4g}")


def _summary(row: dict[str, float]) -> str:
  return f"loss {row['loss']:.4f}, accuracy {row['accuracy']:.1%}"
