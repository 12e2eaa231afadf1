"""The batches of one synthesis: optimizing each in the one loop, this process's share of it, storing it."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from kwjax.network import Network
from kwjax.runtime.checkpoint import Checkpoints
from kwjax.runtime.devices import parallel, processes
from kwjax.runtime.devices.layout import Rows
from kwjax.runtime.devices.parallel import DeviceGroup
from kwjax.runtime.loop import History, Loop, Pace, Store
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
def compiled_step(
  config: SynthesisConfig, group: DeviceGroup, size: int
) -> Callable[..., tuple[SynthesisState, dict[str, Any]]]:
  """`(state, labels, network, key) -> (state, metrics)`: `synthesis_step` for batches of `size` images on these devices."""

  def step(state: Any, labels: Any, network: Network, key: Any, *, axis_name: str | None) -> Any:
    weights = parallel.padding_weights(size, axis_name)
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

  def layout_of(self, index: int) -> Rows:
    """How a batch is split over the devices."""
    return Rows(self.group, self.sizes[index])

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
    if self.config.is_optimized:
      return self._optimized(index, bar)
    bar.update(1)
    start, network = time.monotonic(), self.network
    noise = gaussian_images(
      self.key_of(NOISE, index), self.sizes[index], network.image_shape, network.input_mean, network.input_std
    )
    return Shard(np.asarray(noise), self.labels_of(index), _curves([], time.monotonic() - start))

  def _optimized(self, index: int, bar: tqdm.tqdm) -> Shard:
    network, config, size = self.network, self.config, self.sizes[index]
    layout = self.layout_of(index)
    own = slice(layout.own.start, layout.own.stop)
    devices = self.group.local.devices
    images = initial_images(config, self.key_of(IMAGES, index), size, network.image_shape, devices=devices)
    initial = jax.tree.map(np.asarray, initial_state(config, images[own]))
    targets = self.labels_of(index)[own]
    labels, step = layout.place(targets), compiled_step(config, self.group, size)
    placed, key = self.group.replicate(network), self.group.replicate(self.key_of(STEPS, index))
    curves: dict[str, list[float]] = {}

    def advance(_: int, state: SynthesisState) -> tuple[SynthesisState, dict[str, jax.Array]]:
      state, metrics = step(state, labels, placed, key)
      return state, {name: value for name, value in metrics.items() if name != "layers"}

    def on_log(_: int, history: History, __: Any) -> None:
      for row in history[len(curves.get("loss", ())) :]:
        for name in row.keys() - {"step"}:
          curves.setdefault(name, []).append(row[name])
      if self.callback is not None:
        self.callback(index, curves)

    def summary(row: Mapping[str, float], speed: float) -> str:
      shown = f"J_KL={row['jkl_trimmed']:.4f}" if "jkl_trimmed" in row else f"loss={row['loss']:.4f}"
      return f"{shown}, images/min={60 * speed * size / config.steps:.1f}"

    with self._store(index) as store:
      loop = Loop(
        pace=Pace(config.steps, _LOG_EVERY, 1, checkpoint_seconds=self.checkpoint_seconds),
        store=store,
        layout=layout,
        subject=f"batch {index + 1} of {len(self.sizes)}",
        terms=tuple(map(_describe, watched_layers(network, config))),
        bar=bar,
        summary=summary,
        on_log=on_log,
        advice=f"a lower learning rate than {config.learning_rate} may help",
      )
      ended = loop.finish(store.restore(initial), advance)
    return Shard(np.clip(ended.state.images, 0.0, 1.0), targets, _curves(ended.history, ended.seconds))

  @contextlib.contextmanager
  def _store(self, index: int) -> Iterator[Store]:
    """Each process keeps the states of its own images."""
    if self.folder is None:
      yield Store(should_stop=self.should_stop)
      return
    with Checkpoints(self.checkpoints_of(index)) as checkpoints:
      yield Store(checkpoints, self.settings, is_shared=False, should_stop=self.should_stop)

  def checkpoints_of(self, index: int) -> pathlib.Path:
    """A folder of its own for each batch: their shapes may differ, and a damaged batch is made again after later ones.

    And for each process of several, named after its images: processes that split the batch in another way do not
    meet it, and start the batch anew.
    """
    assert self.folder is not None
    rows = self.layout_of(index).own
    part = f".process-{processes.index()}.images-{rows.start}-to-{rows.stop}" if len(rows) < self.sizes[index] else ""
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


def _curves(history: History, seconds: float) -> dict[str, np.ndarray]:
  """`{term: f32[steps]}` and the `seconds` that all steps took."""
  names = [name for name in history[0] if name != "step"] if history else []
  curves = {name: np.asarray([row[name] for row in history], np.float32) for name in names}
  return {**curves, "seconds": np.asarray(seconds, np.float32)}


def _describe(layer: str) -> str:
  return {LOSS: "the total loss", GRADIENT: "the gradient of the images"}.get(layer, f"the statistics of layer {layer}")
