"""Algorithm 1 for any number of images: batches, progress, checkpoints, resuming."""

from __future__ import annotations

import contextlib
import functools
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from kwjax.batchnorm import reference_moments
from kwjax.errors import Interrupted, KwjaxError, NonFiniteError
from kwjax.network import Network, fingerprint
from kwjax.runtime.checkpoint import Checkpoints
from kwjax.runtime.parallel import DeviceGroup, device_group
from kwjax.runtime.workdir import lock_workdir
from kwjax.synthesis.config import SynthesisConfig
from kwjax.synthesis.noise import gaussian_images
from kwjax.synthesis.pixels import (
  GRADIENT,
  LOSS,
  SynthesisState,
  initial_images,
  initial_state,
  synthesis_step,
  watched_layers,
)
from kwjax.synthesis.store import ImageStore

_IMAGES, _LABELS, _NOISE, _STEPS = range(4)  # independent streams of randomness
_LOG_EVERY = 10


class SampleSet(NamedTuple):
  """Synthesized images.

  Attributes:
    images: f32[n,h,w,c] in [0,1]; Gaussian ones are not clipped.
    labels: i32[n], the classes that were aimed at; -1 where there was no aim.
    history: `{term: f32[batches, steps]}`, each loss term and the J_KL of the views (`jkl`) at each step, and `seconds`
      f32[batches], the time that each batch took over all the runs it was made in.
  """

  images: np.ndarray
  labels: np.ndarray
  history: dict[str, np.ndarray]


def batch_sizes(num_images: int, batch_size: int, *, multiple: int = 1) -> tuple[int, ...]:
  """Split a set into batches whose sizes differ by at most one: a small last batch would have poor statistics.

  Args:
    num_images: images in all.
    batch_size: largest batch.
    multiple: of which every size is a multiple (the number of devices); the sum may then exceed `num_images`.

  Raises:
    KwjaxError: there are no images, or a batch is smaller than the number of devices.
  """
  if num_images < 1:
    raise KwjaxError(f"the number of images must be at least 1, found {num_images}")
  largest = batch_size // multiple
  if largest < 1:
    raise KwjaxError(f"a batch of {batch_size} images does not divide over {multiple} devices")
  units = math.ceil(num_images / multiple)
  count = math.ceil(units / largest)
  return tuple((units // count + (i < units % count)) * multiple for i in range(count))


def target_labels(config: SynthesisConfig, key: jax.Array, count: int, num_classes: int) -> np.ndarray:
  """Targets i32[n]: "balanced" (each class equally often, in random order) or "random"."""
  if config.labels == "random":
    return np.asarray(jax.random.randint(key, (count,), 0, num_classes), np.int32)
  return np.asarray(jax.random.permutation(key, jnp.arange(count) % num_classes), np.int32)


def starting_images(network: Network, config: SynthesisConfig, *, count: int, key: jax.Array) -> jax.Array:
  """The images f32[b,h,w,c] in [0,1] that the first batch of `synthesize` with this key starts from."""
  key = jax.random.fold_in(jax.random.fold_in(key, _IMAGES), 0)
  return jnp.clip(initial_images(config, key, count, network.image_shape), 0.0, 1.0)


def synthesize(
  network: Network,
  config: SynthesisConfig,
  *,
  num_images: int,
  key: jax.Array,
  workdir: str | pathlib.Path | None = None,
  devices: int | Sequence[jax.Device] | DeviceGroup | None = None,
  progress: bool = False,
  checkpoint_seconds: float = 60.0,
  should_stop: Callable[[], bool] = lambda: False,
) -> SampleSet:
  """Make images out of a network: Algorithm 1 of Haroush et al. (2020), batch by batch.

  With a working folder, finished batches and the state of the current one are kept there: killed at any moment and called
  again with the same arguments, it ends with bit-identical images.

  Args:
    network: the trained network.
    config: scheme, objective, schedule, batch size.
    num_images: distinct images in all; batches are made as equal as possible.
    key: PRNG key; everything random derives from it.
    workdir: folder for finished batches and checkpoints; None keeps nothing.
    devices: number of devices, devices, or None (all accelerators, or one CPU).
    progress: show a progress bar.
    checkpoint_seconds: least time between two checkpoints of the current batch.
    should_stop: asked between steps; when true, the state is saved and Interrupted is raised.

  Returns:
    SampleSet with images f32[n,h,w,c] in [0,1], labels i32[n], history.

  Raises:
    NoBatchNormError: the scheme needs BatchNorm statistics and the network has none.
    NonFiniteError: a loss became NaN or infinite; names step, layer and the last good checkpoint.
    CheckpointError: the folder belongs to other settings or is damaged.
    KwjaxError: another process writes to the folder.
    Interrupted: `should_stop` said so.
  """
  if config.is_optimized and config.objective.needs_statistics:
    reference_moments(network)
  group = device_group(devices)
  sizes = batch_sizes(num_images, config.batch_size, multiple=group.size if config.is_optimized else 1)
  settings = {
    "config": config.to_json(),
    "network": fingerprint(network),
    "key": np.asarray(jax.random.key_data(key)).tolist() if _is_typed(key) else np.asarray(key).tolist(),
    "batches": list(sizes),
  }
  labels = target_labels(config, jax.random.fold_in(key, _LABELS), sum(sizes), network.num_classes)
  folder = pathlib.Path(workdir) if workdir is not None else None
  store = ImageStore(folder / "images", settings=settings) if folder else None
  run = _Run(network, config, key, group, sizes, labels, settings, folder, checkpoint_seconds, should_stop)
  parts: list[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]] = []
  with contextlib.ExitStack() as stack:
    if folder is not None:
      stack.enter_context(lock_workdir(folder))
    total = len(sizes) * max(config.steps, 1)
    bar = stack.enter_context(tqdm.tqdm(total=total, disable=not progress, unit="step", desc=config.scheme))
    for index in range(len(sizes)):
      if store is not None and store.has(index):
        bar.update(max(config.steps, 1))
        bar.initial = bar.n  # finished earlier: it says nothing about this run's speed
      else:
        images, history = run.batch(index, bar)
        part = (images, run.labels_of(index), history)
        if store is None:
          parts.append(part)
        else:
          store.write(index, *part)
          shutil.rmtree(run.checkpoints_of(index), ignore_errors=True)
  if store is not None and folder is not None:
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    stored = store.images()
    images, labels, histories = stored.images, stored.labels, stored.histories
  else:
    images, labels = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    histories = tuple(p[2] for p in parts)
  history = {name: np.stack([h[name] for h in histories]) for name in histories[0]}
  return SampleSet(images[:num_images], labels[:num_images], history)


def _is_typed(key: jax.Array) -> bool:
  return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


@functools.lru_cache(maxsize=16)
def compiled_step(config: SynthesisConfig, group: DeviceGroup) -> Callable[..., tuple[SynthesisState, dict[str, Any]]]:
  """`synthesis_step` for these devices: `(state, labels, network, key) -> (state, metrics)`, compiled once a shape."""
  return group.compile(functools.partial(synthesis_step, config=config), donate=(0,))


class _Run(NamedTuple):
  """Everything that stays the same from batch to batch."""

  network: Network
  config: SynthesisConfig
  key: jax.Array
  group: DeviceGroup
  sizes: tuple[int, ...]
  labels: np.ndarray
  settings: dict[str, Any]
  folder: pathlib.Path | None
  checkpoint_seconds: float
  should_stop: Callable[[], bool]

  def labels_of(self, index: int) -> np.ndarray:
    """Targets of one batch; -1 where the scheme has none."""
    start = sum(self.sizes[:index])
    labels = self.labels[start : start + self.sizes[index]]
    return labels if self.config.is_optimized else np.full_like(labels, -1)

  def key_of(self, stream: int, index: int) -> jax.Array:
    """PRNG key of one batch."""
    return jax.random.fold_in(jax.random.fold_in(self.key, stream), index)

  def batch(self, index: int, bar: tqdm.tqdm) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Images f32[b,h,w,c] and `{term: f32[steps]}` of one batch."""
    network, config, size = self.network, self.config, self.sizes[index]
    if not config.is_optimized:
      bar.update(1)
      start = time.monotonic()
      noise = gaussian_images(
        self.key_of(_NOISE, index), size, network.image_shape, network.input_mean, network.input_std
      )
      return np.asarray(noise), {"seconds": np.asarray(time.monotonic() - start, np.float32)}
    images = initial_images(config, self.key_of(_IMAGES, index), size, network.image_shape)
    state = initial_state(config, images)
    if self.folder is None:
      return self._optimize(index, state, {}, 0.0, None, bar)
    with Checkpoints(self.checkpoints_of(index)) as checkpoints:
      restored = checkpoints.restore(jax.tree.map(np.asarray, state), settings=self.settings)
      if restored is None:
        return self._optimize(index, state, {}, 0.0, checkpoints, bar)
      extra = restored.extra
      return self._optimize(index, restored.state, extra["history"], extra["seconds"], checkpoints, bar)

  def checkpoints_of(self, index: int) -> pathlib.Path:
    """A folder of its own for each batch: their shapes may differ, and a damaged batch is made again after later ones."""
    assert self.folder is not None
    return self.folder / "checkpoints" / f"batch-{index:05d}"

  def _optimize(
    self,
    index: int,
    state: SynthesisState,
    history: dict[str, list[float]],
    seconds: float,
    checkpoints: Checkpoints | None,
    bar: tqdm.tqdm,
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    config, group = self.config, self.group
    done, start = int(state.step), time.monotonic()
    bar.update(done)
    bar.initial = bar.n
    placed = self._place(state)
    labels = group.shard(self.labels_of(index))
    network, key = group.replicate(self.network), group.replicate(self.key_of(_STEPS, index))
    step = compiled_step(config, group)
    pending: list[dict[str, Any]] = []
    first, saved_at = done, time.monotonic()
    while done < config.steps:
      placed, metrics = step(placed, labels, network, key)
      pending.append({name: value for name, value in metrics.items() if name != "layers"})
      done += 1
      bar.update(1)
      stop = self.should_stop()
      if done % _LOG_EVERY and done < config.steps and not stop:
        continue
      # One wait for the device every few steps: the steps in between are queued without one.
      self._check(index, placed, checkpoints)
      for values in jax.device_get(pending):
        for name, value in values.items():
          history.setdefault(name, []).append(float(group.first(value)))
      pending.clear()
      rate = (done - first) * self.sizes[index] / config.steps / (time.monotonic() - start) * 60
      shown = {"J_KL": f"{history['jkl'][-1]:.4f}"} if "jkl" in history else {"loss": f"{history['loss'][-1]:.4f}"}
      bar.set_postfix(**shown, **{"images/min": f"{rate:.1f}"}, refresh=False)
      if stop or (done < config.steps and time.monotonic() - saved_at >= self.checkpoint_seconds):
        self._save(index, placed, history, seconds + time.monotonic() - start, checkpoints)
        saved_at = time.monotonic()
      if stop:
        kept = f"; its state is in {checkpoints.folder}" if checkpoints else ""
        raise Interrupted(f"stopped at step {done} of batch {index + 1} of {len(self.sizes)}{kept}")
    images = np.clip(group.unshard(placed.images), 0.0, 1.0)
    curves = {name: np.asarray(values, np.float32) for name, values in history.items()}
    return images, {**curves, "seconds": np.asarray(seconds + time.monotonic() - start, np.float32)}

  def _place(self, state: SynthesisState) -> SynthesisState:
    """Pixels and their Adam moments are split over the devices, counters copied."""
    group = self.group
    return jax.tree.map(lambda leaf: group.shard(leaf) if np.ndim(leaf) else group.replicate(leaf), state)

  def _gathered(self, placed: SynthesisState) -> SynthesisState:
    group = self.group
    scalar = 0 if group.size == 1 else 1
    return jax.tree.map(
      lambda leaf: np.asarray(group.first(leaf)) if leaf.ndim == scalar else group.unshard(leaf), placed
    )

  def _save(
    self,
    index: int,
    placed: SynthesisState,
    history: dict[str, list[float]],
    seconds: float,
    checkpoints: Checkpoints | None,
  ) -> None:
    if checkpoints is not None:
      state = self._gathered(placed)
      extra = {"history": history, "seconds": seconds}
      checkpoints.save(int(state.step), state, settings=self.settings, extra=extra)

  def _check(self, index: int, placed: SynthesisState, checkpoints: Checkpoints | None) -> None:
    bad_step = int(self.group.first(placed.bad_step))
    if bad_step < 0:
      return
    layer = watched_layers(self.network, self.config)[int(self.group.first(placed.bad_layer))]
    good = checkpoints.steps() if checkpoints is not None else []
    kept = f"step {good[-1]} in {checkpoints.folder}" if checkpoints and good else "none"
    where = {LOSS: "the total loss", GRADIENT: "the gradient of the images"}.get(
      layer, f"the statistics of layer {layer}"
    )
    raise NonFiniteError(
      f"{where} became NaN or infinite at step {bad_step} of batch {index + 1} of {len(self.sizes)} "
      f"(last good checkpoint: {kept}); a lower learning rate than {self.config.learning_rate} may help"
    )
