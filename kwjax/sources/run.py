"""A training run on any source: the joint step, the devices, checkpoints of source and student together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.errors import KwjaxError
from kwjax.network import Array
from kwjax.runtime.devices import parallel
from kwjax.runtime.devices.layout import Copies, Layout, Rows
from kwjax.runtime.devices.parallel import DeviceGroup
from kwjax.runtime.loop import History, Loop, Pace, Progress, Store, progress_bar
from kwjax.sources.base import Batch, Source, is_pytree
from kwjax.sources.plan import DRAW, INIT, REFRESH

SOURCE_TERM = "the loss of the source of the images"
"""What is reported where the metrics of a source's update are not finite; behind the terms of the student."""


class Config(Hashable, Protocol):
  """What every training says of its length."""

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


StudentStep = Callable[[Any, Batch, Any, Any, Array | None, str | None], tuple[Any, dict[str, Array]]]
"""`(state, batch, teacher, config, weights, axis_name) -> (state, metrics)`; weights f32[b] are 0 for padding, or None."""


class RunState(NamedTuple):
  """The state of a run, all of which is in its checkpoints.

  Attributes:
    source: of the source.
    student: of the training, `DistillState`: step, student, optimizer, what was not finite.
  """

  source: Any
  student: Any

  @property
  def step(self) -> Array:
    """i32[], steps done."""
    return self.student.step

  @property
  def bad_step(self) -> Array:
    """i32[], the first step at which a term was not finite, or -1."""
    return self.student.bad_step

  @property
  def bad_term(self) -> Array:
    """i32[], which term it was."""
    return self.student.bad_term


@functools.lru_cache(maxsize=16)
def compiled_step(
  group: DeviceGroup,
  structure: Hashable,
  image_shape: tuple[int, int, int],
  step: StudentStep,
  config: Config,
  *,
  updates: bool,
  source_term: int,
) -> Callable[..., tuple[RunState, dict[str, Array]]]:
  """The joint step `(state, source, rows, teacher, key) -> (state, metrics)`: update the source, draw, update the student.

  Args:
    group: the devices.
    structure: of the source as a pytree. It is here because jaxlib 0.10 takes dataclasses with alike fields for one.
    image_shape: (h, w, c) that the source says it has.
    step: what the student does with a batch.
    config: of the step; its `batch_size` images are drawn.
    updates: whether the source is updated.
    source_term: number under which a source is reported whose metrics are not finite.
  """
  del structure

  def joint(
    state: RunState, source: Source[Any], rows: Any, teacher: Any, key: Array, axis_name: str | None
  ) -> tuple[RunState, dict[str, Array]]:
    n, done, made = config.batch_size, state.student.step, state.source
    key = jax.random.fold_in(jax.random.fold_in(key, DRAW), done)
    found: dict[str, Array] = {}
    if updates:
      made, found = source.update(made, key, teacher, state.student.student, axis_name)
    batch = source.draw(made, key, n, axis_name) if rows is None else source.assemble(rows)
    _check_batch(batch, type(source).__name__, (-(-n // group.size), *image_shape))
    student, metrics = step(state.student, batch, teacher, config, parallel.padding_weights(n, axis_name), axis_name)
    if found:
      is_bad = ~jnp.all(jnp.isfinite(jnp.stack([jnp.asarray(value, jnp.float32) for value in found.values()])))
      first = is_bad & (state.student.bad_step < 0)
      student = student._replace(
        bad_step=jnp.where(first, done, student.bad_step), bad_term=jnp.where(first, source_term, student.bad_term)
      )
    return RunState(made, student), {**metrics, **{f"source_{name}": value for name, value in found.items()}}

  return group.compile(joint, donate=(0,))


def _check_batch(batch: Batch, name: str, expected: tuple[int, ...]) -> None:
  """While the step is traced; a batch of another shape would be padded or broadcast somewhere behind."""
  if batch.images.shape != expected:
    raise KwjaxError(f"{name} drew images of shape {batch.images.shape} where {expected} belong")
  if batch.targets is not None and (batch.targets.ndim != 2 or len(batch.targets) != expected[0]):
    raise KwjaxError(f"{name} drew targets of shape {batch.targets.shape} for {expected[0]} images")


def _copied(state: Any) -> Any:
  """A step may reuse the memory of its state, in which a source may have put its own arrays or the teacher's."""
  return jax.tree.map(jnp.array, state)


@dataclasses.dataclass(frozen=True)
class _Joined:
  """A source's state in its layout, a student's as a copy for each device."""

  source: Layout
  student: Layout

  @property
  def group(self) -> DeviceGroup:
    return self.student.group

  def place(self, tree: RunState) -> RunState:
    return RunState(self.source.place(tree.source), self.student.place(tree.student))

  def fetch(self, tree: RunState) -> RunState:
    return RunState(self.source.fetch(tree.source), self.student.fetch(tree.student))


class RunLabels(NamedTuple):
  """What a run is called.

  Attributes:
    title: in front of the progress bar, one word.
    subject: for errors, "distillation from NAME".
    terms: what the student's steps watch.
    summary: `metrics -> text` beside the progress bar.
  """

  title: str
  subject: str
  terms: tuple[str, ...]
  summary: Callable[[dict[str, float]], str]


def train_on(
  source: Source[Any],
  student: Any,
  step: StudentStep,
  config: Config,
  teacher: Any,
  *,
  key: Array,
  group: DeviceGroup,
  store: Store,
  labels: RunLabels,
  progress: bool = False,
  callback: Callable[[int, dict[str, float], Any], None] | None = None,
) -> Progress[RunState]:
  """Trains a student on the images of a source, from the newest checkpoint on.

  Args:
    source: of the images.
    student: state before the first step, `DistillState`.
    step: what a student does with a batch.
    config: of the step, and how long the run is.
    teacher: what steps and source are given, a pytree.
    key: PRNG key; everything random derives from it and the step.
    group: the devices.
    store: where states go.
    labels: what the run is called.
    progress: show a progress bar.
    callback: called with `(steps done, metrics of the last one, student)` every `config.log_every` steps and after the last.

  Raises:
    KwjaxError: the source is no pytree, or draws other shapes than it says.
    NonFiniteError, Interrupted, KeyboardInterrupt, SystemExit: as `kwjax.runtime.loop.Loop.finish`.
  """
  if not is_pytree(source):
    raise KwjaxError(
      f"{type(source).__name__} is no pytree: decorate it with jax.tree_util.register_static, or, where fields are "
      "arrays, jax.tree_util.register_dataclass"
    )
  n, source = config.batch_size, source.on_devices(group.size)
  rows = np.minimum(np.asarray(group.rows(n)), n - 1)
  feed = source.feed(key, n, rows)
  layout = _Joined(Rows(group, n, is_whole=True) if source.has_rows else Copies(group), Copies(group))
  begun = store.restore(RunState(_copied(source.init(jax.random.fold_in(key, INIT))), student))
  given, key_placed = (group.replicate(source), group.replicate(teacher)), group.replicate(key)
  structure, shape = jax.tree.structure(source), tuple(source.image_shape)
  compiled = functools.partial(compiled_step, group, structure, shape, step, config, source_term=len(labels.terms))

  def refreshed(done: int, state: RunState) -> RunState:
    phase_key = jax.random.fold_in(jax.random.fold_in(key, REFRESH), done)
    made = source.refresh(layout.source.fetch(state.source), phase_key, teacher, group.first(state.student.student))
    return state._replace(source=layout.source.place(_copied(made)))

  def advance(done: int, state: RunState) -> tuple[RunState, dict[str, Array]]:
    if source.phase_steps is not None and done % source.phase_steps == 0:
      state = refreshed(done, state)
    drawn = None if feed is None else group.place(feed(done))
    joint = compiled(updates=(done + 1) % source.update_every == 0)
    return joint(state, given[0], drawn, given[1], key_placed)

  def on_log(done: int, history: History, state: RunState) -> None:
    if callback is not None:
      callback(done, history[-1], group.first(state.student.student))

  with progress_bar(config.steps, labels.title, progress) as bar:
    loop = Loop(
      pace=Pace(config.steps, config.log_every, config.log_every, config.checkpoint_every),
      store=store,
      layout=layout,
      subject=labels.subject,
      terms=(*labels.terms, SOURCE_TERM),
      bar=bar,
      summary=lambda row, speed: f"{labels.summary(row)}, {speed * n:.0f} images/s",
      on_log=on_log,
    )
    return loop.finish(begun, advance)
