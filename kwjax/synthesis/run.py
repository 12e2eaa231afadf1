"""The batches of one synthesis: optimizing, checkpoints, this process's share of each, stopping."""

from __future__ import annotations

import functools
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from kwjax.errors import Interrupted, NonFiniteError
from kwjax.network import Network
from kwjax.runtime import processes
from kwjax.runtime.checkpoint import Checkpoints
from kwjax.runtime.parallel import DeviceGroup
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
from kwjax.synthesis.store import ImageStore, Shard

IMAGES, LABELS, NOISE, STEPS = range(4)
"""Independent streams of randomness."""

_LOG_EVERY = 10

Callback = Callable[[int, Mapping[str, Sequence[float]]], None]
"""`(batch, {term: its values at the steps done so far})`."""


@functools.lru_cache(maxsize=16)
def compiled_step(config: SynthesisConfig, group: DeviceGroup) -> Callable[..., tuple[SynthesisState, dict[str, Any]]]:
  """`(state, labels, network, key, weights) -> (state, metrics)`: `synthesis_step` for these devices, compiled once a shape."""

  def step(state: Any, labels: Any, network: Network, key: Any, weights: Any = None, *, axis_name: str | None) -> Any:
    return synthesis_step(state, labels, network, key, config, weights, axis_name=axis_name)

  return group.compile(step, donate=(0,))


class Run(NamedTuple):
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
  callback: Callback | None = None

  def rows_of(self, index: int) -> range:
    """Which images of a batch this process holds; none where there are fewer images than devices."""
    size, held = self.sizes[index], self.group.rows(self.sizes[index])
    return range(min(held.start, size), min(held.stop, size)) if self.config.is_optimized else range(size)

  def labels_of(self, index: int) -> np.ndarray:
    """Targets of one batch; -1 where the scheme has none."""
    start = sum(self.sizes[:index])
    labels = self.labels[start : start + self.sizes[index]]
    return labels if self.config.is_optimized else np.full_like(labels, -1)

  def key_of(self, stream: int, index: int) -> jax.Array:
    """PRNG key of one batch."""
    return jax.random.fold_in(jax.random.fold_in(self.key, stream), index)

  def batch(self, index: int, bar: tqdm.tqdm) -> Shard:
    """Images of one batch that this process holds, their targets, and `{term: f32[steps]}`."""
    network, config, size, rows = self.network, self.config, self.sizes[index], self.rows_of(index)
    targets = self.labels_of(index)[rows.start : rows.stop]
    if not config.is_optimized:
      bar.update(1)
      start = time.monotonic()
      noise = gaussian_images(
        self.key_of(NOISE, index), size, network.image_shape, network.input_mean, network.input_std
      )
      return Shard(np.asarray(noise), targets, {"seconds": np.asarray(time.monotonic() - start, np.float32)})
    devices = self.group.local.devices
    images = initial_images(config, self.key_of(IMAGES, index), size, network.image_shape, devices=devices)
    state = jax.tree.map(np.asarray, initial_state(config, images[rows.start : rows.stop]))
    if self.folder is None:
      return self._optimize(index, state, {}, 0.0, None, bar)
    with Checkpoints(self.checkpoints_of(index)) as checkpoints:
      if processes.count() > 1:
        known = processes.exchange(checkpoints.intact_steps(state, settings=self.settings))
        checkpoints.forget_after(max(set.intersection(*map(set, known)), default=-1))
      restored = checkpoints.restore(state, settings=self.settings)
      if restored is None:
        return self._optimize(index, state, {}, 0.0, checkpoints, bar)
      extra = restored.extra
      return self._optimize(index, restored.state, extra["history"], extra["seconds"], checkpoints, bar)

  def checkpoints_of(self, index: int) -> pathlib.Path:
    """A folder of its own for each batch: their shapes may differ, and a damaged batch is made again after later ones.

    And for each process of several, named after its images: processes that split the batch in another way do not
    meet it, and start the batch anew.
    """
    assert self.folder is not None
    rows, size = self.rows_of(index), self.sizes[index]
    part = "" if len(rows) == size else f".process-{processes.index()}.images-{rows.start}-to-{rows.stop}"
    return self.folder / "checkpoints" / f"batch-{index:05d}{part}"

  def gathered(self, part: Shard) -> Shard:
    """The whole batch from the parts of all processes."""
    if not self.config.is_optimized:
      return part
    return part._replace(images=processes.gather(part.images), labels=processes.gather(part.labels))

  def keep(self, index: int, part: Shard, store: ImageStore) -> None:
    """Store a finished batch, and forget its checkpoints."""
    if not self.config.is_optimized or processes.count() == 1:
      if processes.is_main():
        store.write(index, *part)
    else:
      own = part.history if processes.is_main() else {}
      place = {"part": processes.index(), "parts": processes.count()}
      written = processes.exchange(store.write_part(index, part.images, part.labels, own, **place))
      processes.from_main(lambda: store.record(index, written))
    if self.folder is not None and self.config.is_optimized:
      shutil.rmtree(self.checkpoints_of(index), ignore_errors=True)

  def _optimize(
    self,
    index: int,
    state: SynthesisState,
    history: dict[str, list[float]],
    seconds: float,
    checkpoints: Checkpoints | None,
    bar: tqdm.tqdm,
  ) -> Shard:
    config, group, rows = self.config, self.group, self.rows_of(index)
    done, start = int(state.step), time.monotonic()
    bar.update(done)
    bar.initial = bar.n
    targets = self.labels_of(index)[rows.start : rows.stop]
    placed, labels = self._place(index, state), self._place(index, targets)
    weights = group.weights(self.sizes[index])
    weights = None if weights is None else group.place(weights)
    network, key = group.replicate(self.network), group.replicate(self.key_of(STEPS, index))
    step = compiled_step(config, group)
    pending: list[dict[str, Any]] = []
    first, saved_at = done, time.monotonic()
    while done < config.steps:
      placed, metrics = step(placed, labels, network, key, weights)
      pending.append({name: value for name, value in metrics.items() if name != "layers"})
      done += 1
      bar.update(1)
      stop = processes.count() == 1 and self.should_stop()
      if done % _LOG_EVERY and done < config.steps and not stop:
        continue
      # One wait for the device every few steps: the steps in between are queued without one.
      self._check(index, placed, checkpoints)
      for values in jax.device_get([group.first(metrics) for metrics in pending]):
        for name, value in values.items():
          history.setdefault(name, []).append(float(value))
      pending.clear()
      if self.callback is not None:
        self.callback(index, history)
      rate = (done - first) * self.sizes[index] / config.steps / (time.monotonic() - start) * 60
      shown = {"J_KL": f"{history['jkl'][-1]:.4f}"} if "jkl" in history else {"loss": f"{history['loss'][-1]:.4f}"}
      bar.set_postfix(**shown, **{"images/min": f"{rate:.1f}"}, refresh=False)
      save = done < config.steps and time.monotonic() - saved_at >= self.checkpoint_seconds
      stop, save = self._agreed(stop, save)
      if stop or save:
        self._save(index, placed, history, seconds + time.monotonic() - start, checkpoints)
        saved_at = time.monotonic()
      if stop:
        kept = f"; its state is in {checkpoints.folder}" if checkpoints else ""
        raise Interrupted(f"stopped at step {done} of batch {index + 1} of {len(self.sizes)}{kept}")
    images = np.clip(self._gathered(index, placed).images, 0.0, 1.0)
    curves = {name: np.asarray(values, np.float32) for name, values in history.items()}
    return Shard(images, targets, {**curves, "seconds": np.asarray(seconds + time.monotonic() - start, np.float32)})

  def _agreed(self, stop: bool, save: bool) -> tuple[bool, bool]:
    """All processes stop where one was asked to, and save when process 0's clock says so."""
    if processes.count() == 1:
      return stop, save
    return processes.any_stop(self.should_stop()), processes.from_main(lambda: save)

  def _place(self, index: int, state: Any) -> Any:
    """Rows of this process are filled up with zeros and split over its devices, counters copied."""
    group, missing = self.group, len(self.group.rows(self.sizes[index])) - len(self.rows_of(index))

    def place(leaf: Any) -> jax.Array:
      if not np.ndim(leaf):
        return group.replicate(leaf)
      filling = np.zeros((missing, *leaf.shape[1:]), leaf.dtype)
      return group.place(np.concatenate([leaf, filling]) if missing else leaf)

    return jax.tree.map(place, state)

  def _gathered(self, index: int, placed: SynthesisState) -> SynthesisState:
    """Rows of this process without the filling, on the host: nothing of it depends on the number of devices."""
    group, count = self.group, len(self.rows_of(index))
    scalar = 0 if group.size == 1 else 1
    return jax.tree.map(
      lambda leaf: np.asarray(group.first(leaf)) if leaf.ndim == scalar else group.unshard(leaf)[:count], placed
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
      state = self._gathered(index, placed)
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
