"""A training run as a loop of pure steps: resumed from its checkpoints, stopped on request, watched for NaN."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
import tqdm

from kwjax.errors import NonFiniteError
from kwjax.runtime import processes
from kwjax.runtime.checkpoint import Checkpoints
from kwjax.runtime.parallel import DeviceGroup
from kwjax.runtime.workdir import Shutdown, graceful_shutdown

History = list[dict[str, float]]


class Watched(Protocol):
  """A pytree that is the state of a run, whose steps note what was not finite; no step waits for the host for that."""

  @property
  def step(self) -> jax.Array:
    """i32[], steps done."""
    ...

  @property
  def bad_step(self) -> jax.Array:
    """i32[], the first step at which a term was not finite, or -1."""
    ...

  @property
  def bad_term(self) -> jax.Array:
    """i32[], which of the run's terms it was."""
    ...


State = TypeVar("State", bound=Watched)


class Pace(Protocol):
  """How long a run is and when the host looks at it."""

  @property
  def steps(self) -> int:
    """Steps in all."""
    ...

  @property
  def batch_size(self) -> int:
    """Images a step, over all devices."""
    ...

  @property
  def log_every(self) -> int:
    """Steps between two looks at the metrics."""
    ...

  @property
  def checkpoint_every(self) -> int:
    """Steps between two checkpoints."""
    ...


@dataclasses.dataclass(frozen=True)
class Store:
  """Where a run's state goes; without `checkpoints`, nowhere."""

  what: str = "run"
  checkpoints: Checkpoints | None = None
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  shutdown: Shutdown | None = None

  def restore(self, initial: State) -> tuple[State, History]:
    """The newest stored state and the metrics until then; process 0 reads it, and all get it."""
    state = initial

    def look() -> tuple[bool, History]:
      nonlocal state
      found = self.checkpoints.restore(initial, settings=self.settings) if self.checkpoints else None
      state = initial if found is None else found.state
      return found is not None, [] if found is None else found.extra["history"]

    is_stored, history = processes.from_main(look)
    return processes.broadcast(state) if is_stored else initial, history

  def save(self, step: int, state: Any, history: History) -> None:
    """Stores a state, in process 0."""
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
      raise KeyboardInterrupt(f"{self.what} stopped; its state is in {self.checkpoints.folder}")
    raise SystemExit(self.shutdown.exit_status or 128 + signal.SIGTERM)

  def last_good(self) -> str:
    """What an error says of the state before it."""
    steps = self.checkpoints.steps() if self.checkpoints else []
    if not self.checkpoints or not steps:
      return "there is no checkpoint before it"
    return f"the last good checkpoint is {self.checkpoints.folder / str(steps[-1])}"


@contextlib.contextmanager
def open_store(
  workdir: str | pathlib.Path | None, what: str, settings: Callable[[], dict[str, Any]]
) -> Iterator[Store]:
  """Checkpoints in the folder `what` of `workdir`, locked and with signals turned into a request to stop.

  Args:
    workdir: folder of the run, or None: nothing is stored, and signals are left alone.
    what: name of the run and of its folder.
    settings: gives everything that the result depends on, JSON-able; not called without a folder.
  """
  if workdir is None:
    yield Store(what)
    return
  folder = pathlib.Path(workdir) / what
  found = settings()
  with (
    processes.lock(folder),
    Checkpoints(folder / "checkpoints") as checkpoints,
    graceful_shutdown() as shutdown,
  ):
    yield Store(what, checkpoints, found, shutdown)


def fingerprint(tree: Any) -> str:
  """SHA-256 of all arrays of a pytree with their paths, the first 16 digits."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    array = np.asarray(leaf, order="C")
    digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
    digest.update(array.tobytes())
  return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Loop:
  """Everything about a run but its steps and its state.

  Attributes:
    group: the devices.
    pace: number of steps, and when to look.
    store: where states go.
    title: in front of the progress bar, one word.
    subject: what the run does, for errors: "distillation from NAME".
    terms: names of what the steps watch.
    summary: one line of the metrics, for the progress bar.
    progress: show a progress bar.
    on_log: called with `(steps done, metrics, state of the first device)` whenever the metrics are looked at.
  """

  group: DeviceGroup
  pace: Pace
  store: Store
  title: str
  subject: str
  terms: tuple[str, ...]
  summary: Callable[[dict[str, float]], str]
  progress: bool = False
  on_log: Callable[[int, dict[str, float], Any], None] | None = None

  def finish(
    self, state: State, history: History, advance: Callable[[int, State], tuple[State, dict[str, jax.Array]]]
  ) -> State:
    """Runs the steps that are left.

    Args:
      state: where to go on from, as one device holds it.
      history: metrics of earlier steps; those of every `log_every`-th step and of the last are appended.
      advance: `(step, state on the devices) -> (next state, metrics f32[])`; may reuse the memory of the state.

    Returns:
      The state after the last step, of the first device.

    Raises:
      NonFiniteError: a term was NaN or infinite; names the step, the term and the last good checkpoint.
      KeyboardInterrupt, SystemExit: the run was asked to stop, after its state was saved.
    """
    pace, group, begin = self.pace, self.group, int(state.step)
    state = group.replicate(state)
    clock = time.perf_counter()
    shown = self.progress and processes.is_main()
    with tqdm.tqdm(total=pace.steps, initial=begin, desc=self.title, unit="step", disable=not shown) as bar:
      for step in range(begin, pace.steps):
        state, metrics = advance(step, state)
        done = step + 1
        bar.update()
        looks = done % pace.log_every == 0 or done == pace.steps
        if looks:
          row = {"step": done, **{name: float(value) for name, value in group.first(metrics).items()}}
          self._check(state)
          history.append(row)
          speed = (done - begin) * pace.batch_size / (time.perf_counter() - clock)
          bar.set_postfix_str(f"{self.summary(row)}, {speed:.0f} images/s")
          if self.on_log is not None:
            self.on_log(done, row, group.first(state))
        stop = self.store.stop_requested(looks)
        if done % pace.checkpoint_every == 0 or done == pace.steps or stop:
          self._check(state)
          self.store.save(done, group.first(state), history)
        if stop:
          self.store.stop()
    return group.first(state)

  def _check(self, state: Watched) -> None:
    found = self.group.first((state.bad_step, state.bad_term))
    bad_step, bad_term = int(found[0]), int(found[1])
    if bad_step >= 0:
      raise NonFiniteError(
        f"{self.subject}: {self.terms[bad_term]} became NaN or infinite at step {bad_step}; {self.store.last_good()}"
      )
