"""Algorithm 2 as a run on the images of any source."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from kwjax.batchnorm import matches
from kwjax.distillation.config import DistillConfig
from kwjax.distillation.features import resolve_stages
from kwjax.distillation.step import DistillState, Student, distill_step, initial_state, watched_terms
from kwjax.errors import KwjaxError
from kwjax.intercept import Forwardable, batch_norm_layers
from kwjax.network import Array, Network
from kwjax.runtime.devices.parallel import DeviceGroup, device_group
from kwjax.runtime.loop import History, fingerprint, open_store
from kwjax.sources.base import Batch, Source
from kwjax.sources.fixed import FixedSet, check_images
from kwjax.sources.run import RunLabels, train_on

Callback = Callable[[int, dict[str, float], Any], None]
"""`(steps done, metrics of the last one, student)`; the student's arrays are valid during the call only."""

Images = Array | np.ndarray | Source[Any]

# Gaussian images reach a few standard deviations beyond [0, 1]; pixels in 0..255 reach far beyond that.
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

  Loss: kl_weight KL(teacher || student) + iq_weight IQ + target_weight CE(targets, student). Activation ranges stay frozen;
  the weight scales of a fake-quantized student follow its weights. A step updates the source of the images, draws from it
  and updates the student.

  A batch that does not divide over the devices is padded with images of weight zero. Several processes must all make
  the same call; each forwards its share of every batch, and process 0 keeps the checkpoints.

  Args:
    student: `QuantizedNetwork`, or a float `Network`.
    teacher: the network to agree with, in evaluation mode but for the BatchNorm layers of `config.current`.
    images: f32[n,h,w,c] in [0,1], or u8[n,h,w,c] in 0..255; synthetic or real. Each epoch sees each of them once. Or a
      `Source`, such as `FreshNoise` or `Pixels`, which says itself how its images are augmented and mixed.
    config: how to train.
    key: PRNG key; equal arguments give equal students.
    workdir: keeps checkpoints in its folder `distillation`, of student and source. A run that was killed at any moment and
      is started again with the same arguments ends with bit-identical weights; Ctrl-C and SIGTERM save before they stop it.
    devices: number of devices of each process, or the devices; None: all accelerators, or one CPU a process.
    progress: show a progress bar.
    callback: called every `config.log_every` steps and after the last.

  Returns:
    The trained student, of the type that was given.

  Raises:
    KwjaxError: shapes or stages do not fit, targets are missing, or there are fewer devices.
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
  source = _as_source(images, config)
  check_arguments(student, teacher, source)
  stages = resolve_stages(student, teacher, config.stages) if config.iq_weight > 0.0 else ()
  config = config.replace(stages=stages)
  _check_layers(teacher, config.current)
  labels = RunLabels("distill", f"distillation from {teacher.name}", watched_terms(stages), _summary)
  with open_store(workdir, "distillation", lambda: _settings(student, teacher, source, config, key)) as store:
    ended = train_on(
      source,
      initial_state(student, config),
      _step,
      config,
      teacher,
      key=key,
      group=group,
      store=store,
      labels=labels,
      progress=progress,
      callback=callback,
    )
  return ended.state.student.student, ended.history


def _step(
  state: DistillState[Student],
  batch: Batch,
  teacher: Forwardable,
  config: DistillConfig,
  weights: Array | None,
  axis_name: str | None,
) -> tuple[DistillState[Student], dict[str, Array]]:
  return distill_step(state, batch.images, teacher, config, weights, axis_name, targets=batch.targets)


def _as_source(images: Images, config: DistillConfig) -> Source[Any]:
  if not isinstance(images, Source):
    return FixedSet(images, augment=config.augment, mixup=config.mixup, resident_bytes=config.resident_bytes)
  if config.augment is not None or config.mixup is not None:
    raise KwjaxError(
      f"{type(images).__name__} says itself how its images are drawn: set augment and mixup of the configuration to None"
    )
  return images


def check_arguments(student: Forwardable, teacher: Forwardable, source: Source[Any]) -> None:
  """Refuses what cannot be trained, before anything is computed; raises as `distill` does."""
  if isinstance(source, FixedSet):
    check_images(source.images, (student, teacher), beyond=_BEYOND)
  for network in (student, teacher):
    if tuple(source.image_shape) != tuple(network.image_shape):
      raise KwjaxError(
        f"{network.name} takes images of shape {tuple(network.image_shape)}, and {type(source).__name__} has "
        f"{tuple(source.image_shape)}"
      )


def _check_layers(teacher: Forwardable, patterns: Sequence[str]) -> None:
  network = getattr(teacher, "network", teacher)
  names = batch_norm_layers(network) if patterns and isinstance(network, Network) else ()
  for pattern in patterns if isinstance(network, Network) else ():
    if not any(matches(name, [pattern]) for name in names):
      raise KwjaxError(
        f"no BatchNorm layer of {teacher.name} matches {pattern!r} of current; there are {', '.join(names[:8]) or 'none'}"
      )


def _settings(student: Any, teacher: Any, source: Source[Any], config: DistillConfig, key: Array) -> dict[str, Any]:
  return {
    "config": config.to_json(),
    "key": np.asarray(jax.random.key_data(key)).tolist(),
    "student": fingerprint(student),
    "teacher": fingerprint(teacher),
    "source": source.to_json(),
  }


def _summary(row: dict[str, float]) -> str:
  return f"loss {row['loss']:.4f}, KL {row['kl']:.4f}, agreement {row['agreement']:.1%}, lr {row['learning_rate']:.2g}"
