"""Supervised training as a run: the loop of distillation on a set whose targets are its labels."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kwjax.distillation.step import DistillState, initial_state
from kwjax.network import Array, Network
from kwjax.runtime.data.images import checked_labels
from kwjax.runtime.devices.parallel import device_group
from kwjax.runtime.evaluate import Devices
from kwjax.runtime.loop import History, fingerprint, open_store
from kwjax.sources.base import Batch
from kwjax.sources.fixed import FixedSet, check_images
from kwjax.sources.run import RunLabels, train_on
from kwjax.training.step import TERMS, TrainConfig, train_step

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

  A batch that does not divide over the devices is padded with images of weight zero. Several processes must all make
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
  check_images(images, (network,))
  classes = checked_labels(np.asarray(labels), len(images), network.num_classes, "the training data")
  source = FixedSet(
    images,
    classes,
    num_classes=network.num_classes,
    augment=config.augment,
    resident_bytes=config.resident_bytes,
  )

  def settings() -> dict[str, Any]:
    return {
      "config": config.to_json(),
      "key": np.asarray(jax.random.key_data(key)).tolist(),
      "network": fingerprint(network),
      "images": fingerprint((images, classes)),
    }

  with open_store(workdir, "training", settings) as store:
    ended = train_on(
      source,
      initial_state(network, config),
      _step,
      config,
      None,
      key=key,
      group=group,
      store=store,
      labels=RunLabels("train", f"training of {network.name}", TERMS, _summary),
      progress=progress,
      callback=callback,
    )
  return ended.state.student.student, ended.history


def _step(
  state: DistillState[Network],
  batch: Batch,
  teacher: None,
  config: TrainConfig,
  weights: Array | None,
  axis_name: str | None,
) -> tuple[DistillState[Network], dict[str, Array]]:
  assert batch.targets is not None
  return train_step(state, batch.images, batch.targets, config, weights, axis_name)


def _summary(row: dict[str, float]) -> str:
  return f"loss {row['loss']:.4f}, accuracy {row['accuracy']:.1%}"
