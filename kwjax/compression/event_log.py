"""What a compression shows in TensorBoard while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kwjax.distillation import DistillConfig
from kwjax.runtime.reporting.tensorboard import EventLog
from kwjax.synthesis import SampleSet, SynthesisConfig

Curves = Mapping[str, Sequence[float]]


def synthesis_callback(
  log: EventLog | None, group: str, config: SynthesisConfig
) -> Callable[[int, Curves], None] | None:
  """The callback of a synthesis that writes every term, J_KL and the learning rate of every step; None without a log.

  Args:
    log: where.
    group: in front of the names.
    config: its batches follow each other on one axis of steps.
  """
  if log is None:
    return None
  rate = config.learning_rate_at()
  return lambda batch, curves: log.curves(
    group, batch * config.steps, curves, learning_rate=lambda step: float(rate(step))
  )


def log_samples(log: EventLog | None, group: str, config: SynthesisConfig, samples: SampleSet) -> None:
  """Write what the history of a finished synthesis has and the log does not, because it was made without one, say."""
  callback = synthesis_callback(log, group, config)
  terms = {name: values for name, values in samples.history.items() if np.ndim(values) == 2}
  if callback is not None and terms:
    for batch in range(len(next(iter(terms.values())))):
      callback(batch, {name: values[batch].tolist() for name, values in terms.items()})


def log_distillation(log: EventLog | None, config: DistillConfig, rows: Sequence[Mapping[str, float]]) -> None:
  """Write the metrics of some steps of a fine-tuning, with the learning rate."""
  rate = config.learning_rate_at()
  for row in rows if log is not None else ():
    step = int(row["step"])
    values = {f"distillation/{name}": value for name, value in row.items() if name != "step"}
    log.scalars(step, {**values, "distillation/learning_rate": float(rate(step - 1))})  # type: ignore[union-attr]
