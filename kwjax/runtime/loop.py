"""One loop for every run of pure steps: resumed from its checkpoints, stopped on request, watched for NaN."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
import tqdm

from kwjax.errors import Interrupted, NonFiniteError
from kwjax.runtime.checkpoint import Checkpoints
from kwjax.runtime.devices import processes
from kwjax.runtime.devices.layout import Layout
from kwjax.runtime.workdir import Shutdown, graceful_shutdown

History = list[dict[str, float]]
"""Metrics of the recorded steps, each row with its number of steps done as `step`."""


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


class Progress(NamedTuple, Generic[State]):
  """How far a run has come.

  Attributes:
    state: as a checkpoint holds it.
    history: metrics so far.
    seconds: that its steps took, over all the processes it was continued in.
  """

  state: State
  history: History
  seconds: float


class Pace(NamedTuple):
  """How long a run is and when the host looks at it.

  Attributes:
    steps: steps in all.
    log_every: steps between two looks at the metrics; the host waits for the devices there.
    record_every: steps between two rows of the history; those since the last look are read together.
    checkpoint_every: steps between two checkpoints, the last step included; None: by time alone.
    checkpoint_seconds: least time between two checkpoints, which are made at looks; None: by steps alone.
  """

  steps: int
  log_every: int
  record_every: int
  checkpoint_every: int | None = None
  checkpoint_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Store:
  """Where a run's state goes and who may stop it.

  Attributes:
    checkpoints: None: nothing is stored.
    settings: everything that the result depends on.
    is_shared: process 0 keeps the state of all; else each process keeps its own.
    should_stop: asked between steps; None: nobody stops the run.
    stopped: what is raised then, of a sentence.
  """

  checkpoints: Checkpoints | None = None
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  is_shared: bool = True
  should_stop: Callable[[], bool] | None = None
  stopped: Callable[[str], BaseException] = Interrupted

  def restore(self, initial: State) -> Progress[State]:
    """The newest stored state, or the initial one; of several processes all go on from the same step."""
    if self.checkpoints and not self.is_shared and processes.count() > 1:
      known = processes.exchange(self.checkpoints.intact_steps(initial, settings=self.settings))
      self.checkpoints.forget_after(max(set.intersection(*map(set, known)), default=-1))
    found: Progress[State] = Progress(initial, [], 0.0)

    def look() -> tuple[bool, History, float]:
      nonlocal found
      stored = self.checkpoints.restore(initial, settings=self.settings) if self.checkpoints else None
      if stored is not None:
        found = Progress(stored.state, stored.extra["history"], stored.extra["seconds"])
      return stored is not None, found.history, found.seconds

    if not self.is_shared:
      look()
      return found
    is_stored, history, seconds = processes.from_main(look)
    return Progress(processes.broadcast(found.state), history, seconds) if is_stored else found

  def save(self, done: int, progress: Progress[State]) -> None:
    """Stores a state, in process 0 or in each."""
    if self.checkpoints and (not self.is_shared or processes.is_main()):
      extra = {"history": progress.history, "seconds": progress.seconds}
      self.checkpoints.save(done, progress.state, settings=self.settings, extra=extra)

  def stop_requested(self, at_a_look: bool) -> bool:
    """Whether to stop; several processes agree on it, and only where the host waits for the devices anyway."""
    if self.should_stop is None or (processes.count() > 1 and not at_a_look):
      return False
    return processes.any_stop(self.should_stop())

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
    yield Store()
    return
  folder = pathlib.Path(workdir) / what
  found = settings()
  with (
    processes.lock(folder),
    Checkpoints(folder / "checkpoints") as checkpoints,
    graceful_shutdown() as shutdown,
  ):
    stopped = lambda text: _as_signalled(shutdown, text)
    yield Store(checkpoints, found, should_stop=lambda: shutdown.requested, stopped=stopped)


def _as_signalled(shutdown: Shutdown, text: str) -> BaseException:
  """What the signal would have raised."""
  if shutdown.exit_status == 128 + signal.SIGINT:
    return KeyboardInterrupt(text)
  return SystemExit(shutdown.exit_status or 128 + signal.SIGTERM)


def fingerprint(tree: Any) -> str:
  """SHA-256 of all arrays of a pytree with their paths, the first 16 digits."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    array = np.asarray(leaf, order="C")
    digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
    digest.update(array.tobytes())
  return digest.hexdigest()[:16]


def progress_bar(total: int, title: str, shown: bool) -> tqdm.tqdm:
  """A bar of steps, which only process 0 shows; `Loop` moves it."""
  return tqdm.tqdm(total=total, desc=title, unit="step", disable=not (shown and processes.is_main()))


@dataclasses.dataclass(frozen=True)
class Loop:
  """Everything about a run but its steps and its state.

  Attributes:
    pace: number of steps, and when to look.
    store: where states go.
    layout: how states lie on the devices.
    subject: what the run does, for errors: "distillation from NAME".
    terms: names of what the steps watch.
    bar: of `progress_bar`.
    summary: `(metrics of the last recorded step, steps per second) -> text` beside the bar.
    on_log: called with `(steps done, history, state on the devices)` whenever the history has grown.
    advice: what may help where a term is not finite, behind a semicolon.
  """

  pace: Pace
  store: Store
  layout: Layout
  subject: str
  terms: tuple[str, ...]
  bar: tqdm.tqdm
  summary: Callable[[dict[str, float], float], str]
  on_log: Callable[[int, History, Any], None] | None = None
  advice: str = ""

  def finish(
    self, progress: Progress[State], advance: Callable[[int, State], tuple[State, dict[str, jax.Array]]]
  ) -> Progress[State]:
    """Runs the steps that are left.

    Args:
      progress: where to go on from.
      advance: `(step, state on the devices) -> (next state, metrics f32[])`; may reuse the memory of the state.

    Returns:
      The progress after the last step.

    Raises:
      NonFiniteError: a term was NaN or infinite; names the step, the term and the last good checkpoint.
      Interrupted, KeyboardInterrupt, SystemExit: the run was asked to stop, after its state was saved.
    """
    pace, store, history = self.pace, self.store, list(progress.history)
    begin = int(progress.state.step)
    state = self.layout.place(progress.state)
    self.bar.update(begin)
    self.bar.initial = self.bar.n  # made earlier: it says nothing about this run's speed
    unread: list[tuple[int, dict[str, jax.Array]]] = []
    start = saved = time.monotonic()

    def reached(state: State) -> Progress[State]:
      return Progress(self.layout.fetch(state), history, progress.seconds + time.monotonic() - start)

    for step in range(begin, pace.steps):
      state, metrics = advance(step, state)
      done, is_last = step + 1, step + 1 == pace.steps
      self.bar.update()
      if done % pace.record_every == 0 or is_last:
        unread.append((done, metrics))
      looks = done % pace.log_every == 0 or is_last
      stop = store.stop_requested(looks)
      due = pace.checkpoint_every is not None and (done % pace.checkpoint_every == 0 or is_last)
      if not (looks or stop or due):
        continue
      # One wait for the devices every few steps: the steps in between are queued without one.
      self._check(state)
      rows = self._read(unread)
      unread.clear()
      if rows:
        history.extend(rows)
        self.bar.set_postfix_str(self.summary(rows[-1], (done - begin) / (time.monotonic() - start)), refresh=False)
        if self.on_log is not None:
          self.on_log(done, history, state)
      if looks and not is_last:
        due = self._overdue(time.monotonic() - saved) or due
      if store.checkpoints and (due or stop):
        store.save(done, reached(state))
        saved = time.monotonic()
      if stop:
        kept = f"; its state is in {store.checkpoints.folder}" if store.checkpoints else ""
        raise store.stopped(f"stopped at step {done} of {self.subject}{kept}")
    return reached(state)

  def _overdue(self, seconds: float) -> bool:
    """Whether the last checkpoint is so long ago, by process 0's clock."""
    limit = self.pace.checkpoint_seconds
    return limit is not None and processes.from_main(lambda: seconds >= limit)

  def _read(self, unread: list[tuple[int, dict[str, jax.Array]]]) -> History:
    values = jax.device_get([self._first(metrics) for _, metrics in unread])
    return [
      {"step": done, **{name: float(value) for name, value in row.items()}}
      for (done, _), row in zip(unread, values, strict=True)
    ]

  def _first(self, tree: Any) -> Any:
    return self.layout.group.first(tree)

  def _check(self, state: Watched) -> None:
    bad_step, bad_term = (int(value) for value in jax.device_get(self._first((state.bad_step, state.bad_term))))
    if bad_step >= 0:
      advice = f"; {self.advice}" if self.advice else ""
      raise NonFiniteError(
        f"{self.subject}: {self.terms[bad_term]} became NaN or infinite at step {bad_step}; {self.store.last_good()}{advice}"
      )
