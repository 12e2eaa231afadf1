"""Algorithm 1 for any number of images: batches, progress, the working folder."""

from __future__ import annotations

import contextlib
import math
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.batchnorm import reference_moments
from kwjax.errors import KwjaxError
from kwjax.network import Network, fingerprint
from kwjax.runtime.devices import processes
from kwjax.runtime.devices.parallel import DeviceGroup, device_group
from kwjax.runtime.loop import progress_bar
from kwjax.synthesis.config import SynthesisConfig
from kwjax.synthesis.pixels import initial_images, target_labels
from kwjax.synthesis.run import IMAGES, LABELS, Callback, Run
from kwjax.synthesis.run import compiled_step as compiled_step
from kwjax.synthesis.store import ImageStore, Shard


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


def batch_sizes(num_images: int, batch_size: int) -> tuple[int, ...]:
  """Split a set into batches whose sizes differ by at most one: a small last batch would have poor statistics.

  Args:
    num_images: images in all.
    batch_size: largest batch.

  Raises:
    KwjaxError: there are no images, or no room for one in a batch.
  """
  if num_images < 1:
    raise KwjaxError(f"the number of images must be at least 1, found {num_images}")
  if batch_size < 1:
    raise KwjaxError(f"a batch must hold at least 1 image, found {batch_size}")
  count = math.ceil(num_images / batch_size)
  return tuple(num_images // count + (i < num_images % count) for i in range(count))


def starting_images(
  network: Network,
  config: SynthesisConfig,
  *,
  count: int,
  key: jax.Array,
  devices: int | Sequence[jax.Device] | DeviceGroup | None = None,
) -> jax.Array:
  """The images f32[b,h,w,c] in [0,1] that the first batch of `synthesize` with this key starts from."""
  key, local = jax.random.fold_in(jax.random.fold_in(key, IMAGES), 0), device_group(devices).local.devices
  return jnp.clip(initial_images(config, key, count, network.image_shape, devices=local), 0.0, 1.0)


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
  callback: Callback | None = None,
) -> SampleSet:
  """Make images out of a network: Algorithm 1 of Haroush et al. (2020), batch by batch.

  With a working folder, finished batches and the state of the current one are kept there: killed at any moment and called
  again with the same arguments, it ends with bit-identical images.

  Over several devices a batch that does not divide is padded with images of weight zero, so that what is made does not
  depend on their number. Of several processes each holds and stores its share of the images; all must make the same
  call, see the same working folder, and get all the images.

  Args:
    network: the trained network.
    config: scheme, objective, schedule, batch size.
    num_images: distinct images in all; batches are made as equal as possible.
    key: PRNG key; everything random derives from it.
    workdir: folder for finished batches and checkpoints; None keeps nothing.
    devices: number of devices of each process, devices, or None (all accelerators, or one CPU a process).
    progress: show a progress bar.
    checkpoint_seconds: least time between two checkpoints of the current batch.
    should_stop: asked between steps (every ten steps where several processes must agree); when true in any process, the
      state is saved and Interrupted is raised in all.
    callback: called every ten steps and after the last step of a batch with `(batch, {term: values so far})`, the
      values of a resumed batch from its first step on; not called for batches that were finished before.

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
  sizes = batch_sizes(num_images, config.batch_size)
  settings = _settings(network, config, key, sizes)
  labels = target_labels(config, jax.random.fold_in(key, LABELS), num_images, network.num_classes)
  folder = pathlib.Path(workdir) if workdir is not None else None
  store = ImageStore(folder / "images", settings=settings) if folder else None
  run = Run(network, config, key, group, sizes, labels, settings, folder, checkpoint_seconds, should_stop, callback)
  parts: list[Shard] = []
  with contextlib.ExitStack() as stack:
    if folder is not None:
      stack.enter_context(processes.lock(folder))
    finished = processes.from_main(lambda: [i for i in range(len(sizes)) if store is not None and store.has(i)])
    bar = stack.enter_context(progress_bar(len(sizes) * max(config.steps, 1), config.scheme, progress))
    for index in range(len(sizes)):
      if index in finished:
        bar.update(max(config.steps, 1))
        bar.initial = bar.n  # finished earlier: it says nothing about this run's speed
        continue
      part = run.batch(index, bar)
      if store is None:
        parts.append(run.gathered(part))
      else:
        run.keep(index, part, store)
    if folder is not None and processes.is_main():
      shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if store is not None:
      processes.barrier()  # process 0 has recorded the last batch
      images, labels, histories = store.images()
      processes.barrier()  # the lock must outlast everybody's reading
    else:
      images, labels = np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts])
      histories = tuple(p.history for p in parts)
  history = {name: np.stack([h[name] for h in histories]) for name in histories[0]}
  return SampleSet(images, labels, history)


def _settings(network: Network, config: SynthesisConfig, key: jax.Array, sizes: tuple[int, ...]) -> dict[str, Any]:
  """What the images depend on."""
  return {
    "config": config.to_json(),
    "network": fingerprint(network),
    "key": np.asarray(jax.random.key_data(key)).tolist() if _is_typed(key) else np.asarray(key).tolist(),
    "batches": list(sizes),
  }


def _is_typed(key: jax.Array) -> bool:
  return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
