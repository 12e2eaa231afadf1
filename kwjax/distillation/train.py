"""Algorithm 2 as a run: batches, devices, checkpoints, progress."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from kwjax.batchnorm import matches
from kwjax.distillation.batches import Feed, compiled_step, planner
from kwjax.distillation.config import Augment, DistillConfig
from kwjax.distillation.features import resolve_stages
from kwjax.distillation.step import DistillState, Student, distill_step, initial_state, watched_terms
from kwjax.errors import DataError, KwjaxError
from kwjax.intercept import Forwardable, batch_norm_layers
from kwjax.network import Array, Network
from kwjax.runtime.loop import History, Loop, fingerprint, open_store
from kwjax.runtime.parallel import DeviceGroup, device_group

Callback = Callable[[int, dict[str, float], Any], None]
"""`(steps done, metrics of the last one, student)`; the student's arrays are valid during the call only."""

Images = Array | np.ndarray | Augment
_BEYOND = 10.0


def distill(
  student: Student,
  teacher: Forwardable,
  images: Images,
  config: DistillConfig,
  *,
  key: Array,
  workdir: str | pathlib.Path | None = None,
  devices: int | Sequence[jax.Device] | DeviceGroup | None = None,
  progress: bool = False,
  callback: Callback | None = None,
) -> Student:
  """Train a student to agree with its teacher on images, without labels: Algorithm 2 of Haroush et al. (2020).

  Loss: kl_weight KL(teacher || student) + iq_weight IQ, on mixed images. Activation ranges stay frozen; the weight
  scales of a fake-quantized student follow its weights.

  A batch that does not divide over the devices is filled up with images of weight zero. Several processes must all make
  the same call; each forwards its share of every batch, and process 0 keeps the checkpoints.

  Args:
    student: `QuantizedNetwork`, or a float `Network`.
    teacher: the network to agree with, in evaluation mode but for the BatchNorm layers of `config.current`.
    images: f32[n,h,w,c] in [0,1], or u8[n,h,w,c] in 0..255; synthetic or real. Each epoch sees each of them once. Or a
      function that draws every image of every step anew, such as `fresh_dead_leaves`; it takes the place of
      `config.augment`.
    config: how to train.
    key: PRNG key; equal arguments give equal students.
    workdir: keeps checkpoints in its folder `distillation`. A run that was killed at any moment and is started again
      with the same arguments ends with bit-identical weights; Ctrl-C and SIGTERM save before they stop it.
    devices: number of devices of each process, or the devices; None: all accelerators, or one CPU a process.
    progress: show a progress bar.
    callback: called every `config.log_every` steps and after the last.

  Returns:
    The trained student, of the type that was given.

  Raises:
    KwjaxError: shapes or stages do not fit, or there are fewer devices.
    DataError: there are no images, or their values lie outside the range.
    NonFiniteError: a term became NaN or infinite; names the step, the term and the last good checkpoint.
    CheckpointError: `workdir` holds a run with other arguments.
    KeyboardInterrupt, SystemExit: the run was asked to stop, after its state was saved.
  """
  trained, _ = distill_with_history(
    student, teacher, images, config, key=key, workdir=workdir, devices=devices, progress=progress, callback=callback
  )
  return trained


def distill_with_history(
  student: Student,
  teacher: Forwardable,
  images: Images,
  config: DistillConfig,
  *,
  key: Array,
  workdir: str | pathlib.Path | None = None,
  devices: int | Sequence[jax.Device] | DeviceGroup | None = None,
  progress: bool = False,
  callback: Callback | None = None,
) -> tuple[Student, History]:
  """As `distill`; also returns the metrics of every `config.log_every`-th step and of the last: `step`, `loss`, ..."""
  group = device_group(devices)
  images, config = _as_set(images, student, config)
  check_arguments(student, teacher, images, config)
  stages = resolve_stages(student, teacher, config.stages) if config.iq_weight > 0.0 else ()
  config = config.replace(stages=stages)
  plan = planner(key, images.shape[0], config)
  _check_layers(teacher, config.current)
  initial = initial_state(student, config)
  with open_store(workdir, "distillation", lambda: _settings(student, teacher, images, config, key)) as store:
    state, history = store.restore(initial)
    feed = Feed.of(images, plan, config.batch_size, group, config.resident_bytes)
    placed, step_fn = group.replicate(teacher), compiled_step(group, distill_step, config, feed.is_resident)

    def advance(step: int, state: DistillState[Student]) -> tuple[DistillState[Student], dict[str, Array]]:
      batch, drawn = feed.batch(step)
      return step_fn(state, batch, group.place(drawn), placed, feed.weights)

    def on_log(step: int, metrics: dict[str, float], state: DistillState[Student]) -> None:
      if callback is not None:
        callback(step, metrics, state.student)

    subject, terms = f"distillation from {teacher.name}", watched_terms(stages)
    loop = Loop(group, config, store, "distill", subject, terms, _summary, progress, on_log)
    state = loop.finish(state, history, advance)
  return state.student, history


def _as_set(images: Images, student: Forwardable, config: DistillConfig) -> tuple[Array | np.ndarray, DistillConfig]:
  """A function that draws images as one that is applied to a set: only the shape of that is used."""
  if not callable(images):
    return images, config
  if config.augment is not None:
    raise KwjaxError("images that are drawn anew take the place of augment: set config.augment to None")
  return np.zeros((config.batch_size, *student.image_shape), np.uint8), config.replace(augment=images)


def check_arguments(
  student: Forwardable, teacher: Forwardable, images: Array | np.ndarray, config: DistillConfig
) -> None:
  """Refuses what cannot be trained, before anything is computed; raises as `distill` does."""
  shape = tuple(images.shape)
  for network in (student, teacher):
    if len(shape) != 4 or shape[1:] != tuple(network.image_shape):
      raise KwjaxError(
        f"images of {network.name} have shape (n, {', '.join(map(str, network.image_shape))}), found {shape}"
      )
  if shape[0] == 0:
    raise DataError("there are no images to distill with")
  if images.dtype == np.uint8:
    return
  low, high = float(images.min()), float(images.max())
  # Gaussian images reach a few standard deviations beyond [0, 1]; pixels in 0..255 reach far beyond that.
  if not (low >= -_BEYOND and high <= 1.0 + _BEYOND):
    raise DataError(
      f"images must be in units of [0, 1] (noise may exceed it by {_BEYOND:g}) or uint8, "
      f"found values from {low:.4g} to {high:.4g}"
    )


def _check_layers(teacher: Forwardable, patterns: Sequence[str]) -> None:
  network = getattr(teacher, "network", teacher)
  names = batch_norm_layers(network) if patterns and isinstance(network, Network) else ()
  for pattern in patterns if isinstance(network, Network) else ():
    if not any(matches(name, [pattern]) for name in names):
      raise KwjaxError(
        f"no BatchNorm layer of {teacher.name} matches {pattern!r} of current; there are {', '.join(names[:8]) or 'none'}"
      )


def _settings(student: Any, teacher: Any, images: Any, config: DistillConfig, key: Array) -> dict[str, Any]:
  return {
    "config": config.to_json(),
    "key": np.asarray(jax.random.key_data(key)).tolist(),
    "student": fingerprint(student),
    "teacher": fingerprint(teacher),
    "images": fingerprint(images),
  }


def _summary(row: dict[str, float]) -> str:
  return f"loss {row['loss']:.4f}, KL {row['kl']:.4f}, agreement {row['agreement']:.1%}, lr {row['learning_rate']:.2g}"
