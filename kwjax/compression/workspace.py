"""Where a compression, or another study of one network, is done: devices, what is finished, when to stop."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax

from kwjax.errors import Interrupted
from kwjax.network import Network
from kwjax.runtime.devices import processes
from kwjax.runtime.devices.parallel import DeviceGroup
from kwjax.runtime.reporting import messages
from kwjax.runtime.reporting.tensorboard import EventLog
from kwjax.runtime.result_store import ResultStore

GAUSSIAN, REAL = "gaussian", "real"
SYNTHESIS_KEY, GAUSSIAN_KEY, CALIBRATION_KEY, DISTILL_KEY, REAL_KEY, RECONSTRUCT_KEY, VIEWS_KEY = range(7)
_SMALL = 64  # pixels


def never_stop() -> bool:
  """For work that nobody wants to stop."""
  return False


def stream_key(seed: int, stream: int) -> jax.Array:
  """PRNG key of one part of a run; equal seeds give the same images in every command."""
  return jax.random.fold_in(jax.random.key(seed), stream)


class Workspace(NamedTuple):
  """Where work is done.

  Attributes:
    network: the float network.
    group: devices that the work is spread over.
    results: what is finished; in the run's folder, or in memory.
    should_stop: whether this process was asked to stop.
    scratch: folder for the checkpoints of a fine-tuning; None keeps none.
    checkpoint_seconds: least time in seconds between two saved states of a synthesis.
    checkpoint_steps: fine-tuning steps between two saved states.
    events: where curves go for TensorBoard, in the main process alone; or None.
    progress: whether lines and progress bars are shown.
  """

  network: Network
  group: DeviceGroup
  results: ResultStore
  should_stop: Callable[[], bool] = never_stop
  scratch: pathlib.Path | None = None
  checkpoint_seconds: float = 20.0
  checkpoint_steps: int = 200
  events: EventLog | None = None
  progress: bool = True

  @property
  def folder(self) -> pathlib.Path:
    """The run's folder; only for work that has one."""
    assert self.results.folder is not None
    return self.results.folder

  @property
  def batch_size(self) -> int:
    """Images of this network in a forward pass."""
    return 256 if is_small(self.network) else 32

  def log(self, text: str) -> None:
    """A line for the person who watches."""
    if self.progress:
      messages.log(text)

  def stop_if_asked(self) -> None:
    """Leave here if the run was asked to stop; all processes must call it at the same point.

    Raises:
      Interrupted: finished results are kept.
    """
    if processes.any_stop(self.should_stop()):
      where = f"; finished results are in {self.results.folder}" if self.results.folder is not None else ""
      raise Interrupted(f"stopped{where}")


def is_small(network: Network) -> bool:
  """Whether a network's images are of CIFAR's size rather than ImageNet's."""
  return network.image_shape[0] <= _SMALL
