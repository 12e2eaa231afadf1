"""What a source of images is: its state, a draw, an update, and what the host does between phases."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np

from kwjax.network import Array
from kwjax.runtime.loop import fingerprint

State = TypeVar("State")
Metrics = dict[str, Array]
Feed = Callable[[int], Any]
"""`step -> arrays of this process's rows of the batch`, from the host."""


class Batch(NamedTuple):
  """What a step of training sees.

  Attributes:
    images: f32[n,h,w,c] in [0,1]; Gaussian noise may lie outside.
    targets: f32[n,k], the soft labels that the maker of the images aimed at, a row of zeros where there was no aim; or None.
  """

  images: Array
  targets: Array | None = None


class Source(abc.ABC, Generic[State]):
  """Where the images of a training come from: a frozen pytree of settings and pure functions of a state.

  A source needs `image_shape`, `init` and `draw`; the rest has a default. The class is a frozen dataclass that JAX knows as a
  pytree: by `jax.tree_util.register_static` where all fields are settings, by `jax.tree_util.register_dataclass` where some
  are arrays, which then go to the devices once.

  Always: `init`, `draw` and `update` depend on nothing but their arguments. The state keeps its structure and shapes, and
  everything that is learnt or remembered is in it, because checkpoints hold the state. Labels, noise and mixtures are values
  of one shape, never Python branches.

  A step updates the source, draws from it and updates the student. `update` and `draw` get the same key: a source that needs
  several folds them from it, and one whose student is to see the very images of the update makes them from the same key and
  the weights before the update, which it keeps in its state.
  """

  if TYPE_CHECKING:
    # Read-only, so that fields of frozen dataclasses may take their place, and properties.

    @property
    def image_shape(self) -> tuple[int, int, int]:
      """(h, w, c); every source has it."""

    @property
    def has_rows(self) -> bool:
      """Whether arrays of the state hold a row an image and are split over the devices; False: each device has a copy."""

    @property
    def update_every(self) -> int:
      """Steps between two calls of `update`, 1; with 5 the student sees five draws for one update."""

    @property
    def phase_steps(self) -> int | None:
      """Steps between two calls of `refresh`, the first before step 0; None: it is never called."""

  else:
    has_rows, update_every, phase_steps = False, 1, None

  @abc.abstractmethod
  def init(self, key: Array) -> State:
    """The state before the first step, any pytree of arrays; of a PRNG key."""

  @abc.abstractmethod
  def draw(self, state: State, key: Array, n: int, axis_name: str | None = None) -> Batch:
    """A batch of n images; pure, traced inside the step.

    Args:
      state: after the step's update.
      key: PRNG key of the step, the same on every device.
      n: images over all devices. Each of D devices draws its ceil(n / D) rows, see `batch_rows`
        in `kwjax.runtime.devices.parallel`.
      axis_name: mapped axis of the devices.
    """

  def update(
    self, state: State, key: Array, teacher: Any, student: Any, axis_name: str | None = None
  ) -> tuple[State, Metrics]:
    """The next state and metrics f32[] over all devices, as a step of learning gives them; the identity by default.

    Args:
      state: before the step.
      key: PRNG key of the step, the same for `draw`.
      teacher: the network to compress.
      student: in training, before the step. Gradients may pass through both.
      axis_name: mapped axis of the devices; gradients are taken with `kwjax.runtime.devices.parallel`.
    """
    del key, teacher, student, axis_name
    return state, {}

  def refresh(self, state: State, key: Array, teacher: Any, student: Any) -> State:
    """The state at the start of a phase of `phase_steps` steps, made on the host; the identity by default.

    Args:
      state: as a checkpoint holds it.
      key: PRNG key of the phase.
      teacher: the network to compress.
      student: in training.
    """
    del key, teacher, student
    return state

  def feed(self, key: Array, n: int, rows: np.ndarray) -> Feed | None:
    """What steps take from the host, for images that do not fit on the devices; None by default: they only `draw`.

    Args:
      key: PRNG key of the run.
      n: images of a batch.
      rows: i32[m], rows of the batch that this process holds; padding repeats the last one.

    Returns:
      `step -> pytree of arrays [m, ...]`, which `assemble` makes into this device's part of the batch.
    """
    del key, n, rows
    return None

  def assemble(self, rows: Any) -> Batch:
    """The batch of the rows that `feed` gave, inside the step; only for sources with a feed."""
    raise NotImplementedError(f"{type(self).__name__} has a feed and no assemble")

  def on_devices(self, count: int) -> Source[State]:
    """What `count` devices hold of this source; the source itself by default."""
    del count
    return self

  def to_json(self) -> dict[str, Any]:
    """What the images depend on, for checkpoints: the fields of the dataclass; of arrays their SHA-256."""
    names: list[str] = [field.name for field in dataclasses.fields(self)] if dataclasses.is_dataclass(self) else []
    return {"name": _name(type(self)), **{name: described(getattr(self, name)) for name in names}}


def described(value: Any) -> Any:
  """A setting as JSON: a function by its name, arrays by their SHA-256, anything with `to_json` by what that returns."""
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if hasattr(value, "to_json"):
    return value.to_json()
  if isinstance(value, Mapping):
    return {str(name): described(entry) for name, entry in value.items()}
  # A dataclass of arrays, such as a network, is a pytree with leaves of its own.
  has_leaves = is_pytree(value) and jax.tree.leaves(value)
  if dataclasses.is_dataclass(value) and not isinstance(value, type) and not has_leaves:
    settings = {field.name: described(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"name": _name(type(value)), **settings}
  if isinstance(value, Sequence):
    return [described(entry) for entry in value]
  if callable(value):
    # A partial function has the name of what it calls.
    return _name(value if hasattr(value, "__qualname__") else getattr(value, "func", type(value)))
  return fingerprint(value)


def _name(value: Any) -> str:
  return f"{value.__module__}.{value.__qualname__}"


def is_pytree(value: Any) -> bool:
  """Whether JAX knows the class of a value as a pytree, not as a leaf."""
  return not jax.tree_util.all_leaves([value])
