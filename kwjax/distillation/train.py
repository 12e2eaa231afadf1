"""Algorithm 2 as a run: batches, devices, checkpoints, progress."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from kwjax.distillation.batches import Plan, assemble, gather, planner, take
from kwjax.distillation.config import DistillConfig
from kwjax.distillation.features import resolve_stages
from kwjax.distillation.step import DistillState, Student, distill_step, initial_state, watched_terms
from kwjax.errors import DataError, KwjaxError, NonFiniteError
from kwjax.intercept import Forwardable
from kwjax.network import Array
from kwjax.runtime import processes
from kwjax.runtime.checkpoint import Checkpoints
from kwjax.runtime.parallel import DeviceGroup, device_group
from kwjax.runtime.workdir import Shutdown, graceful_shutdown

History = list[dict[str, float]]
Callback = Callable[[int, dict[str, float], Any], None]
"""`(steps done, metrics of the last one, student)`; the student's arrays are valid during the call only."""

_BEYOND = 10.0


def distill(
  student: Student,
  teacher: Forwardable,
  images: Array | np.ndarray,
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
    teacher: the network to agree with, in evaluation mode.
    images: f32[n,h,w,c] in [0,1], or u8[n,h,w,c] in 0..255; synthetic or real. Each epoch sees each of them once.
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
  options = {"key": key, "workdir": workdir, "devices": devices, "progress": progress, "callback": callback}
  return distill_with_history(student, teacher, images, config, **options)[0]  # type: ignore[arg-type]


def distill_with_history(
  student: Student,
  teacher: Forwardable,
  images: Array | np.ndarray,
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
  check_arguments(student, teacher, images, config)
  stages = resolve_stages(student, teacher, config.stages) if config.iq_weight > 0.0 else ()
  config = config.replace(stages=stages)
  plan = planner(key, images.shape[0], config)
  initial = initial_state(student, config)
  with contextlib.ExitStack() as stack:
    store = _NO_STORE
    if workdir is not None:
      settings = _settings(student, teacher, images, config, key)
      store = stack.enter_context(_open_store(pathlib.Path(workdir), settings))
    state, history = store.restore(initial)
    run = _Run(group, config, plan, store, watched_terms(stages), teacher.name, progress, callback)
    state = run.finish(state, history, teacher, images)
  return state.student, history


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


def fingerprint(tree: Any) -> str:
  """SHA-256 of all arrays of a pytree with their paths, the first 16 digits."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    array = np.asarray(leaf, order="C")
    digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
    digest.update(array.tobytes())
  return digest.hexdigest()[:16]


def _settings(student: Any, teacher: Any, images: Any, config: DistillConfig, key: Array) -> dict[str, Any]:
  return {
    "config": config.to_json(),
    "key": np.asarray(jax.random.key_data(key)).tolist(),
    "student": fingerprint(student),
    "teacher": fingerprint(teacher),
    "images": fingerprint(images),
  }


@dataclasses.dataclass(frozen=True)
class _Store:
  """Where the run's state goes; without `checkpoints`, nowhere."""

  checkpoints: Checkpoints | None = None
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  shutdown: Shutdown | None = None

  def restore(self, initial: DistillState[Student]) -> tuple[DistillState[Student], History]:
    """The newest stored state; process 0 reads it, and all get it."""
    state = initial

    def look() -> tuple[bool, History]:
      nonlocal state
      found = self.checkpoints.restore(initial, settings=self.settings) if self.checkpoints else None
      state = initial if found is None else found.state
      return found is not None, [] if found is None else found.extra["history"]

    is_stored, history = processes.from_main(look)
    return processes.broadcast(state) if is_stored else initial, history

  def save(self, step: int, state: DistillState[Student], history: History) -> None:
    if self.checkpoints and processes.is_main():
      self.checkpoints.save(step, state, settings=self.settings, extra={"history": history})

  def stop_requested(self, at_a_wait: bool) -> bool:
    """Whether to stop; several processes agree on it, and only where the host waits for the devices anyway."""
    if self.shutdown is None or (processes.count() > 1 and not at_a_wait):
      return False
    return processes.any_stop(self.shutdown.requested)

  def stop(self) -> None:
    """Ends the run as the signal would have, now that the state is on disk."""
    assert self.shutdown is not None
    assert self.checkpoints is not None
    if self.shutdown.exit_status == 128 + signal.SIGINT:
      raise KeyboardInterrupt(f"distillation stopped; its state is in {self.checkpoints.folder}")
    raise SystemExit(self.shutdown.exit_status or 128 + signal.SIGTERM)

  def last_good(self) -> str:
    steps = self.checkpoints.steps() if self.checkpoints else []
    if not self.checkpoints or not steps:
      return "there is no checkpoint before it"
    return f"the last good checkpoint is {self.checkpoints.folder / str(steps[-1])}"


_NO_STORE = _Store()


@contextlib.contextmanager
def _open_store(workdir: pathlib.Path, settings: dict[str, Any]) -> Iterator[_Store]:
  folder = workdir / "distillation"
  with (
    processes.lock(folder),
    Checkpoints(folder / "checkpoints") as checkpoints,
    graceful_shutdown() as shutdown,
  ):
    yield _Store(checkpoints, settings, shutdown)


@dataclasses.dataclass(frozen=True)
class _Run:
  """Everything about a run but its state and its data."""

  group: DeviceGroup
  config: DistillConfig
  plan: Callable[[int], Plan]
  store: _Store
  terms: tuple[str, ...]
  teacher: str
  progress: bool
  callback: Callback | None

  def finish(self, state: DistillState[Student], history: History, teacher: Any, images: Any) -> DistillState[Student]:
    """Runs the steps that are left; appends to `history`."""
    config, group, begin = self.config, self.group, int(state.step)
    rows, weights = group.rows(config.batch_size), group.weights(config.batch_size)
    weights = None if weights is None else group.place(weights)
    resident = images.nbytes * group.size <= config.resident_bytes
    source = group.replicate(images) if resident else np.asarray(images)
    teacher, state = group.replicate(teacher), group.replicate(state)
    step_fn = _compiled_step(group, config, resident)
    clock = time.perf_counter()
    shown = self.progress and processes.is_main()
    with tqdm.tqdm(total=config.steps, initial=begin, desc="distill", unit="step", disable=not shown) as bar:
      for step in range(begin, config.steps):
        plan = self.plan(step)
        plan = plan if weights is None and group.local == group else take(plan, rows)
        batch = source if resident else group.place(gather(source, plan))
        state, metrics = step_fn(state, batch, group.place(plan), teacher, weights)
        done = step + 1
        bar.update()
        last = done == config.steps
        if done % config.log_every == 0 or last:
          row = {"step": done, **{name: float(value) for name, value in group.first(metrics).items()}}
          self.check(state)
          history.append(row)
          speed = (done - begin) * config.batch_size / (time.perf_counter() - clock)
          bar.set_postfix_str(_summary(row, speed))
          if self.callback is not None:
            self.callback(done, row, group.first(state).student)
        stop = self.store.stop_requested(done % config.log_every == 0 or last)
        if done % config.checkpoint_every == 0 or last or stop:
          self.check(state)
          self.store.save(done, group.first(state), history)
        if stop:
          self.store.stop()
    return group.first(state)

  def check(self, state: DistillState[Student]) -> None:
    """Raises NonFiniteError if any step so far met a value that is not finite."""
    found = self.group.first((state.bad_step, state.bad_term))
    bad_step, bad_term = int(found[0]), int(found[1])
    if bad_step >= 0:
      raise NonFiniteError(
        f"distillation from {self.teacher}: {self.terms[bad_term]} became NaN or infinite at step {bad_step}; "
        f"{self.store.last_good()}"
      )


@functools.lru_cache(maxsize=8)
def _compiled_step(group: DeviceGroup, config: DistillConfig, resident: bool) -> Callable[..., Any]:
  """`(state, source, plan, teacher, weights) -> (state, metrics)`; kept, so a run with another seed need not compile."""

  def step(state: Any, source: Any, plan: Plan, teacher: Any, weights: Any, axis_name: str | None) -> Any:
    images, partners = gather(source, plan) if resident else source
    batch = assemble(images, partners, plan, config.augment)
    return distill_step(state, batch, teacher, config, weights, axis_name=axis_name)

  return group.compile(step, donate=(0,))


def _summary(row: dict[str, float], images_per_second: float) -> str:
  return (
    f"loss {row['loss']:.4f}, KL {row['kl']:.4f}, agreement {row['agreement']:.1%}, {images_per_second:.0f} images/s"
  )
