"""Block reconstruction as a run: unit by unit, each from the features behind the units before it."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from kwjax.errors import Interrupted, KwjaxError
from kwjax.network import Array, Network
from kwjax.quantization.extremes import check_images
from kwjax.quantization.wrap import QuantizedNetwork
from kwjax.reconstruction.config import ReconstructConfig
from kwjax.reconstruction.features import Forwarded, Shelf, forward, open_shelf, placed
from kwjax.reconstruction.fisher import channel_weights
from kwjax.reconstruction.report import UnitReport
from kwjax.reconstruction.rounding import Step
from kwjax.reconstruction.step import TERMS, Given, Rows, begin, compiled_step, ended, keys_of
from kwjax.reconstruction.trace import Form, Soft, given_variables
from kwjax.reconstruction.units import Cut, Part, Unit, find_units
from kwjax.reconstruction.values import Layers, Values
from kwjax.runtime.devices.layout import Copies
from kwjax.runtime.devices.parallel import DeviceGroup, Devices, device_group
from kwjax.runtime.loop import Loop, Pace, Progress, Store, fingerprint, open_store, progress_bar
from kwjax.sources.plan import planner

_ITERATIONS, _ROWS = 0, 1  # streams of a unit's randomness


def reconstruct(
  student: QuantizedNetwork,
  images: Array | np.ndarray,
  config: ReconstructConfig | None = None,
  *,
  key: Array,
  reference: Network | None = None,
  workdir: str | pathlib.Path | None = None,
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] | None = None,
) -> QuantizedNetwork:
  r"""Choose the rounding of every weight and the step of every activation so that each unit gives what it gives in float.

  For the units of `find_units` in order: minimize
  $\mathrm{E}\sum_c (y_c - \hat y_c)^2 + \lambda \sum 1 - |2 h(V) - 1|^\beta$ over rounding offsets $h(V)$ and activation
  steps. $y$ is the float network's output of the unit, $\hat y$ that of the quantized unit behind quantized units. At the end
  every weight lies on an ordinary grid, within one level of its float value.

  Args:
    student: a calibrated student; any network that kwjax can quantize.
    images: f32[n,h,w,c] in [0,1], a few hundred; synthetic or real.
    config: how; default: the preset "fast".
    key: PRNG key; equal arguments give equal students.
    reference: the float network to agree with; default: the student's own float weights.
    workdir: keeps every finished unit in its folder `reconstruction`. A run that was killed and is started again with the same
      arguments goes on behind the last of them and ends with the same bits.
    devices: number of devices of each process, devices, or None: all accelerators, or one CPU a process.
    progress: show a progress bar with the unit, its error and the time left.
    should_stop: asked between steps; when true, the finished units are kept and Interrupted is raised.

  Returns:
    The student with other weights, weight grids and ranges.

  Raises:
    KwjaxError: nothing is quantized, or the network cannot be cut into units.
    DataError: there are no images, or they do not fit the network.
    NonFiniteError: the error or its gradient became NaN or infinite; names the unit and the step.
    CheckpointError: `workdir` holds a run with other arguments.
    Interrupted, KeyboardInterrupt, SystemExit: the run was asked to stop.

  Source: Nagel et al. (2020), "Up or Down? Adaptive Rounding"; Li et al. (2021), "BRECQ"; Wei et al. (2022), "QDrop".
  """
  return reconstruct_with_report(
    student,
    images,
    config,
    key=key,
    reference=reference,
    workdir=workdir,
    devices=devices,
    progress=progress,
    should_stop=should_stop,
  )[0]


def reconstruct_with_report(
  student: QuantizedNetwork,
  images: Array | np.ndarray,
  config: ReconstructConfig | None = None,
  *,
  key: Array,
  reference: Network | None = None,
  workdir: str | pathlib.Path | None = None,
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] | None = None,
) -> tuple[QuantizedNetwork, tuple[UnitReport, ...]]:
  """As `reconstruct`, on images f32[n,h,w,c]; also returns what happened to each unit."""
  config = config or ReconstructConfig()
  reference = student.network if reference is None else reference
  check_images(student.network, images)
  group = device_group(devices)
  layers = Layers(student)
  if not any(rule.weight_bits or rule.activation_bits for rule in layers.rules.values()):
    raise KwjaxError(f"{student.name}: nothing is quantized, so there is nothing to reconstruct")
  config = config.replace(batch_size=group.padded(min(config.batch_size, len(images))))
  units = find_units(student.network, config.units)
  settings = lambda: _settings(student, reference, images, config, key)
  with open_store(workdir, "reconstruction", settings) as store, open_shelf(workdir, config.host_bytes) as shelf:
    if should_stop is not None:
      store = _stoppable(store, should_stop)
    run = _Run(layers, reference, config, group, units, store, shelf, key)
    with progress_bar(len(units) * config.iterations, "reconstruct", progress) as bar:
      values, reports = run.finish(np.asarray(images, np.float32), bar)
  return layers.student_with(values), reports


def _stoppable(store: Store, should_stop: Callable[[], bool]) -> Store:
  """A store that the caller can stop too, and then raises Interrupted."""
  by_signal, asked = store.should_stop or (lambda: False), False

  def either() -> bool:
    nonlocal asked
    asked = asked or should_stop()
    return asked or by_signal()

  stopped = lambda text: Interrupted(text) if asked else store.stopped(text)
  return dataclasses.replace(store, should_stop=either, stopped=stopped)


def _settings(
  student: QuantizedNetwork, reference: Network, images: Any, config: ReconstructConfig, key: Array
) -> dict[str, Any]:
  return {
    "config": config.to_json(),
    "key": np.asarray(jax.random.key_data(key)).tolist(),
    "student": fingerprint(student),
    "rules": student.rules.to_json(),
    "reference": fingerprint(reference),
    "images": fingerprint(np.asarray(images)),
  }


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
  """Everything that stays the same from unit to unit."""

  layers: Layers
  reference: Network
  config: ReconstructConfig
  group: DeviceGroup
  units: tuple[Unit, ...]
  store: Store
  shelf: Shelf
  key: Array

  @property
  def student(self) -> QuantizedNetwork:
    """As it was calibrated."""
    return self.layers.student

  def _cut(self, form: Form, given: Mapping[str, Any]) -> Cut:
    shaped = lambda tree: jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree))
    network = self.student.network.replace(variables=shaped(dict(self.student.variables)))
    variables = shaped(given_variables(self.student.variables, given))
    return Cut(network, self.units, self.layers.bits, form, variables, self.config.batch_size // self.group.size)

  @functools.cached_property
  def _cuts(self) -> dict[Form, Cut]:
    """The network in its three forms."""
    intervals = {name: self.student.ranges[name] for name in self.layers.bits}
    return {
      "float": self._cut("float", {}),
      "hard": self._cut("hard", intervals),
      "soft": self._cut("soft", self._soft),
    }

  @functools.cached_property
  def _soft(self) -> dict[str, Soft]:
    """Placeholders for what every step gives the soft form."""
    found = {}
    for name in self.layers.bits:
      shape, key = jnp.shape(self.student.ranges[name].lo), jax.random.key(0)
      step = Step(jnp.ones(shape), jnp.zeros(shape))
      found[name] = Soft(step, jax.random.split(key, shape) if shape else key, jnp.zeros(shape))
    return found

  def finish(self, images: np.ndarray, bar: tqdm.tqdm) -> tuple[Values, tuple[UnitReport, ...]]:
    """Reconstructs the units that are left."""
    begun = self.store.restore(self.layers.initial())
    values, reports = begun.state, [UnitReport.from_row(row, unit) for row, unit in zip(begun.history, self.units)]
    done, start = len(reports), time.monotonic()
    if done == len(self.units):
      bar.update(bar.total)
      return values, tuple(reports)
    weights = self._channels(images)
    quantized = exact = images
    for index, _ in enumerate(self.units):
      part = self._cuts["float"].parts[index]
      target = self._forward(part, part.leaves(dict(self.reference.variables)), exact).outputs
      if index < done:
        following = self._hard(index, values, quantized).outputs
        bar.update(self.config.iterations)
        bar.initial = bar.n  # made earlier: it says nothing about this run's speed
      else:
        rows = Rows(quantized, exact, target)
        values, report, following = self._unit(index, rows, values, weights[index], bar)
        values = values._replace(step=jnp.int32(index + 1))
        reports.append(report)
        history = [each.to_row() for each in reports]
        self.store.save(index + 1, Progress(values, history, begun.seconds + time.monotonic() - start))
      for old in {id(array): array for array in (quantized, exact)}.values():
        self.shelf.drop(old)
      quantized, exact = following, target
    return values, tuple(reports)

  def _forward(
    self, part: Part, leaves: list[Any], x: np.ndarray, wanted: np.ndarray | None = None, channels: Array | None = None
  ) -> Forwarded:
    return forward(
      part,
      leaves,
      x,
      wanted,
      channels,
      batch_size=self.config.batch_size,
      group=self.group,
      shelf=self.shelf,
      should_stop=self.store.should_stop or (lambda: False),
    )

  def _hard_leaves(self, index: int, values: Values) -> list[Any]:
    """Variables of a unit in the hard form."""
    variables = self.layers.rounded(self.units[index].layers, values)
    return self._cuts["hard"].parts[index].leaves(given_variables(variables, values.ranges))

  def _hard(self, index: int, values: Values, x: np.ndarray, *wanted: Any) -> Forwarded:
    """What a unit of the student gives with some values."""
    return self._forward(self._cuts["hard"].parts[index], self._hard_leaves(index, values), x, *wanted)

  def _unit(
    self, index: int, rows: Rows, values: Values, channels: Array, bar: tqdm.tqdm
  ) -> tuple[Values, UnitReport, np.ndarray]:
    """Reconstructs a unit; also returns what it gives then."""
    start, unit = time.monotonic(), self.units[index]
    names = {str(i): name for i, name in enumerate(unit.layers)}
    kernels = {i: jnp.asarray(values.kernels[name]) for i, name in names.items() if name in values.kernels}
    steps = {i: self.layers.step(name, values.ranges[name]) for i, name in names.items() if name in values.ranges}
    calibrated = self._hard(index, values, rows.quantized, rows.target, channels)
    if not (kernels or (steps and self.config.step_rate > 0.0)):
      bar.update(self.config.iterations)
      report = UnitReport(unit.name, unit.layers, calibrated.error, calibrated.error, 0.0, True, 0.0)
      return values, report, calibrated.outputs
    state, weights = begin(
      kernels, {i: self.layers.grid(names[i], kernel) for i, kernel in kernels.items()}, steps, self.config
    )
    leaves = self._cuts["soft"].parts[index].leaves(given_variables(self.student.variables, self._soft))
    state = self._train(index, state, rows, Given(leaves, weights, steps, channels), bar)
    bits = tuple((i, self.layers.bits[names[i]]) for i in steps)
    found = ended(state.trained, weights, kernels, steps, bits)
    made = values._replace(
      kernels={**values.kernels, **{names[i]: kernel for i, kernel in found.kernels.items()}},
      grids={**values.grids, **{names[i]: spacing for i, spacing in found.spacings.items()}},
      ranges={**values.ranges, **{names[i]: interval for i, interval in found.intervals.items()}},
    )
    trained = self._hard(index, made, rows.quantized, rows.target, channels)
    kept = trained.error <= calibrated.error
    changed = float(found.changed) / max(sum(kernel.size for kernel in kernels.values()), 1)
    seconds = time.monotonic() - start
    report = UnitReport(unit.name, unit.layers, calibrated.error, trained.error, changed, kept, seconds)
    self.shelf.drop(calibrated.outputs if kept else trained.outputs)
    return (made, report, trained.outputs) if kept else (values, report, calibrated.outputs)

  def _channels(self, images: np.ndarray) -> list[Array]:
    """Weight of each channel of each unit's output."""
    parts = self._cuts["hard"].parts
    if not self.config.fisher:
      return [jnp.ones(part.channels) for part in parts]
    leaves = [self._hard_leaves(index, self.layers.initial()) for index in range(len(parts))]
    stop = self.store.should_stop or (lambda: False)
    return channel_weights(parts, leaves, self.reference, images, self.group, stop)

  def _train(self, index: int, state: Any, rows: Rows, given: Given, bar: tqdm.tqdm) -> Any:
    config, unit = self.config, self.units[index]
    key = jax.random.fold_in(self.key, index)
    plan = planner(jax.random.fold_in(key, _ROWS), len(rows.target), config.batch_size)
    held = placed(rows, self.group, config.resident_bytes)
    own = self.group.rows(config.batch_size)
    run = compiled_step(self.group, self._cuts["soft"].parts[index], config, held is not None)
    constants, step_key = self.group.replicate(given), jax.random.fold_in(key, _ITERATIONS)

    def advance(step: int, state: Any) -> Any:
      chosen = plan(step).chosen[own.start : own.stop]
      picked = chosen if held is not None else tuple(array[chosen] for array in rows)
      keys = self.group.replicate(keys_of(step_key, step, given.steps))
      return run(state, held, self.group.place(picked), constants, keys)

    loop = Loop(
      pace=Pace(config.iterations, config.log_every, config.log_every),
      store=Store(should_stop=self.store.should_stop, stopped=self.store.stopped),
      layout=Copies(self.group),
      subject=f"reconstruction of {unit.name} of {self.student.name}",
      terms=TERMS,
      bar=bar,
      summary=lambda row, _: f"{unit.name}, error {row['error']:.4g}",
      advice="a smaller rounding_rate or step_rate may help",
    )
    return loop.finish(Progress(state, [], 0.0), advance).state
