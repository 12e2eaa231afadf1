"""The main job: synthesize, measure, calibrate, compare, fine-tune, report."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import cost, memory, results
from experiments.common import (
  Stages,
  every_device,
  get_network,
  in_workdir,
  keep_freed_memory,
  say,
  use_compilation_cache,
  use_every_core,
)
from experiments.options import Options, Sizes, result_settings, run_folder, sizes, synthesis_config
from experiments.scoring import Scorer
from kwjax.analysis.similarity import Similarity, measure
from kwjax.batchnorm import INPUT
from kwjax.distillation import DistillConfig, distill
from kwjax.errors import Interrupted, KwjaxError, NoBatchNormError
from kwjax.network import Network
from kwjax.quantization import (
  QuantizedNetwork,
  QuantRules,
  RangeTable,
  observe_ranges,
  quantize,
  ranges_from,
  save_quantized,
)
from kwjax.quantization.integer import representable_weights
from kwjax.runtime import processes
from kwjax.runtime.data import ImageData, load_data
from kwjax.runtime.files import canonical_json, settings_differences
from kwjax.runtime.parallel import DeviceGroup
from kwjax.runtime.workdir import Shutdown
from kwjax.synthesis import SampleSet, SynthesisConfig, starting_images, synthesize

GAUSSIAN, REAL = "gaussian", "real"
_SYNTHESIS_KEY, _GAUSSIAN_KEY, _CALIBRATION_KEY, _DISTILL_KEY = range(4)


class Job(NamedTuple):
  """Everything a stage needs."""

  options: Options
  group: DeviceGroup
  network: Network
  chosen: Sizes
  config: SynthesisConfig
  rules: dict[str, QuantRules]
  stages: Stages
  shutdown: Shutdown
  eval_data: ImageData | None
  real_data: ImageData | None

  def key(self, stream: int) -> jax.Array:
    """PRNG key of one stage."""
    return jax.random.fold_in(jax.random.key(self.options.seed), stream)

  def shutdown_point(self) -> None:
    """Leave here if the run was asked to stop.

    Raises:
      Interrupted: finished stages are kept.
    """
    if processes.any_stop(self.shutdown.requested):
      raise Interrupted(f"stopped; finished stages are in {self.stages.folder}")

  @property
  def total(self) -> int:
    """All synthetic images."""
    return self.chosen.images + self.chosen.held_out


def run(options: Options, *, name: str, default: str | None) -> int:
  """The whole main job for one command line.

  Args:
    options: the command line.
    name: of the experiment, for its folder.
    default: architecture of the embedded network that is used when none is given, or None.

  Returns:
    exit status 0.

  Raises:
    KwjaxError: anything the user can mend.
    Interrupted: the run was asked to stop.
  """
  use_every_core(options.devices)
  processes.initialize(options.coordinator, options.num_processes, options.process_id)
  use_compilation_cache()
  keep_freed_memory()
  group = every_device(options.devices)
  network = get_network(options, default=default)
  rules = parse_rules(options, network)
  chosen = sizes(options, network)
  config = synthesis_config(options, network, chosen)
  eval_data, real_data = _load(options.eval_data, network), _load(options.real_data, network)
  folder = run_folder(name, options, network)
  need = memory.predict(network, config, chosen, group.size)
  if options.dry_run and processes.is_main():
    labelled = len(eval_data) if eval_data else 0
    print(cost.describe(network, config, chosen, tuple(rules), folder, labelled=labelled, need=need))
  memory.check(need, group.local.devices)
  if options.dry_run:
    return 0
  check_same_settings(options, network)
  say(f"{network.name}: {config.scheme} images, then {', '.join(rules)}; everything goes to {folder}")

  def work(folder: pathlib.Path, shutdown: Shutdown) -> None:
    stages = Stages(folder, result_settings(options, network))
    execute(Job(options, group, network, chosen, config, rules, stages, shutdown, eval_data, real_data))

  in_workdir(folder, options, work)
  return 0


def check_same_settings(options: Options, network: Network) -> None:
  """Refuse processes of one run that would not do the same work.

  Raises:
    KwjaxError: their options, network or data sets differ.
  """
  everybody = processes.exchange(json.loads(canonical_json(result_settings(options, network))))
  for index, settings in enumerate(everybody):
    differences = settings_differences(everybody[0], settings)
    if differences:
      raise KwjaxError(f"process {index} of {len(everybody)} was started with other options than 0: {differences[0]}")


def parse_rules(options: Options, network: Network) -> dict[str, QuantRules]:
  """Rules of every requested precision, checked against the network's layers.

  Raises:
    KwjaxError: no precision is given, one is malformed or given twice.
  """
  if not options.bits or len(set(options.bits)) != len(options.bits):
    raise KwjaxError(
      f"--bits needs one or more different precisions such as 8w8a 4w4a, found {' '.join(options.bits)!r}"
    )
  overrides = []
  for text in options.overrides:
    pattern, separator, bits = text.rpartition("=")
    if not separator:
      raise KwjaxError(f"--overrides takes PATTERN=BITS such as 1x1=8w8a, found {text!r}")
    overrides.append((pattern, bits))
  rules = {
    bits: QuantRules.parse(
      bits,
      first_last=options.first_last_bits(),
      overrides=overrides,
      weights=options.weight_reading,
      ranges=options.range_reading,
    )
    for bits in options.bits
  }
  for rule in rules.values():
    rule.resolve(network)
  return rules


def _load(spec: str | None, network: Network) -> ImageData | None:
  if spec is None:
    return None
  return load_data(spec, image_shape=network.image_shape, num_classes=network.num_classes)


def execute(job: Job) -> None:
  """Run every stage that is not done yet, and write the report."""
  samples = make_images(job, job.config, "synthesis", _SYNTHESIS_KEY)
  scheme = job.config.scheme
  calibration: dict[str, np.ndarray] = {scheme: samples.images[: job.chosen.images]}
  if scheme != GAUSSIAN:
    gaussian = make_images(job, SynthesisConfig.preset(GAUSSIAN), GAUSSIAN, _GAUSSIAN_KEY)
    calibration[GAUSSIAN] = gaussian.images[: job.chosen.images]
  if job.real_data is not None:
    calibration[REAL] = real_images(job, job.real_data)
  held_out = samples.images[job.chosen.images :]
  similarity = job.stages.once("similarity", lambda: _similarities(job, calibration))
  say(
    "measuring the float network"
    if job.eval_data
    else "no --eval-data: agreement is measured on held-out synthetic images"
  )
  scorer = Scorer(
    job.network,
    held_out,
    job.eval_data,
    devices=job.group,
    should_stop=lambda: job.shutdown.requested,
  )
  float_result = job.stages.once("float", lambda: scorer.score(job.network))
  quantized, scores = calibrate_all(job, calibration, scorer)
  tuned = fine_tune(job, quantized[job.options.bits[-1]][scheme], calibration[scheme], scorer)
  say("writing the report")
  if not processes.is_main():
    return
  final = tuned[0] if tuned else quantized[job.options.bits[-1]][scheme]
  save_quantized(final, job.stages.folder / "quantized")
  results.write(
    job.stages.folder,
    job=results.Facts(
      network=job.network,
      options=job.options,
      config=job.config,
      rules={bits: rule.describe() for bits, rule in job.rules.items()},
      calibration={data: len(images) for data, images in calibration.items()},
      held_out=len(held_out),
      eval_name=job.eval_data.name if job.eval_data else None,
      final_name=final.name,
      integers=f"{len(representable_weights(final))} of {len(job.rules[job.options.bits[-1]].resolve(job.network))} layers "
      "with integer weights beside the float ones",
    ),
    samples=samples,
    similarity=similarity,
    float_result=float_result,
    scores=scores,
    tuned=tuned[1] if tuned else None,
  )
  say(f"done: {job.stages.folder / 'report.html'}")


def make_images(job: Job, config: SynthesisConfig, folder: str, stream: int) -> SampleSet:
  """Synthesize calibration and held-out images of one scheme, resuming what is there."""
  return synthesize(
    job.network,
    config.replace(batch_size=config.batch_size if config.is_optimized else job.total),
    num_images=job.total,
    key=job.key(stream),
    workdir=job.stages.folder / folder,
    devices=job.group,
    progress=config.is_optimized,
    checkpoint_seconds=job.options.checkpoint_seconds,
    should_stop=lambda: job.shutdown.requested,
  )


def real_images(job: Job, data: ImageData) -> np.ndarray:
  """As many real images as there are synthetic ones, drawn evenly over the data set."""
  count = min(job.chosen.images, len(data))
  return data.read(np.linspace(0, len(data) - 1, count).round().astype(int))


def _similarities(job: Job, calibration: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
  """J_KL of every image set, and of where the synthesis started; None without BatchNorm."""
  sets: dict[str, Callable[[], np.ndarray | jax.Array]] = {
    name: functools.partial(np.asarray, images) for name, images in calibration.items()
  }
  if job.config.is_optimized:
    count = min(job.config.batch_size, job.total)
    start = functools.partial(starting_images, job.network, job.config, count=count, key=job.key(_SYNTHESIS_KEY))
    sets = {"start": start, **sets}
  found = {}
  for name, images in sets.items():
    job.shutdown_point()
    try:
      found[name] = _similarity(
        measure(
          job.network,
          images(),
          include_input=True,
          batch_size=32,
          devices=job.group,
          should_stop=lambda: job.shutdown.requested,
        )
      )
    except NoBatchNormError:
      return None
  return found


def _similarity(similarity: Similarity) -> dict[str, Any]:
  layers = similarity.layer_means()
  without_input = [value for layer, value in layers.items() if layer != INPUT]
  return {
    "jkl": float(similarity.jkl),
    "without_input": float(np.mean(without_input)),
    "per_layer": layers,
    "count": similarity.count,
  }


def calibrate_all(
  job: Job, calibration: Mapping[str, np.ndarray], scorer: Scorer
) -> tuple[dict[str, dict[str, QuantizedNetwork]], dict[str, dict[str, Any]]]:
  """Every precision with every image set: `{bits: {data: network}}` and `{bits: {data: score}}`.

  One pass over each image set serves all precisions: the ranges are those of the float network.
  """
  tables = {data: _range_table(job, data, images) for data, images in calibration.items()}
  quantized: dict[str, dict[str, QuantizedNetwork]] = {}
  scores: dict[str, dict[str, Any]] = {}
  for bits, rules in job.rules.items():
    quantized[bits], scores[bits] = {}, {}
    for data, table in tables.items():
      ranges = ranges_from(
        table,
        rules,
        key=job.key(_CALIBRATION_KEY),
        steps=job.chosen.calibration_steps,
        batch_size=job.chosen.calibration_batch,
      )
      network = quantize(job.network, rules, ranges)
      quantized[bits][data] = network
      scores[bits][data] = job.stages.once(f"calibrated-{bits}-{data}", functools.partial(scorer.score, network))
      say(f"calibrated {bits} with {data}: {results.in_words(scores[bits][data])}")
  return quantized, scores


def _range_table(job: Job, data: str, images: np.ndarray) -> RangeTable:
  """Activation extremes of every image, kept between runs."""
  job.shutdown_point()

  def compute() -> dict[str, Any]:
    say(f"observing activation ranges on {len(images)} {data} images")
    table = observe_ranges(
      job.network,
      images,
      batch_size=32,
      progress=True,
      devices=job.group,
      should_stop=lambda: job.shutdown.requested,
    )
    return table.to_json()

  return RangeTable.from_json(job.stages.once(f"ranges-{data}", compute))


def fine_tune(
  job: Job, student: QuantizedNetwork, images: np.ndarray, scorer: Scorer
) -> tuple[QuantizedNetwork, dict[str, Any]] | None:
  """Distill the float network into the last precision of --bits; the tuned network and its score, or None for 0 steps."""
  steps = job.chosen.distill_steps
  if steps == 0:
    return None
  job.shutdown_point()
  say(f"fine-tuning {student.name}: {steps} steps")
  tuned = distill(
    student,
    job.network,
    images,
    distill_config(job),
    key=job.key(_DISTILL_KEY),
    workdir=job.stages.folder,
    devices=job.group,
    progress=True,
  )
  score = job.stages.once("distilled", lambda: scorer.score(tuned))
  say(f"fine-tuned {student.name}: {results.in_words(score)}")
  return tuned, score


def distill_config(job: Job) -> DistillConfig:
  """Settings of the fine-tuning: published ones under --preset paper, else those that suit a short run."""
  chosen, small = job.chosen, job.network.image_shape[0] <= 64
  # Noise has other statistics than data, so the running ones are kept; and without the batch's own statistics only a
  # tenth of the learning rate is stable.
  frozen = job.config.scheme == GAUSSIAN
  changes: dict[str, Any] = {
    "steps": chosen.distill_steps,
    "batch_size": chosen.distill_batch_size,
    "batch_norm": "frozen" if frozen else "train",
    "checkpoint_every": job.options.checkpoint_steps,
  }
  if job.options.preset != "paper" or job.options.distill_steps is not None:
    changes["warmup_steps"] = chosen.distill_steps // 20
  if job.options.distill_learning_rate is not None:
    changes["learning_rate"] = job.options.distill_learning_rate
  elif frozen:
    changes["learning_rate"] = 0.01 if job.options.preset == "paper" else 0.001
  name = ("cifar" if small else "imagenet") if job.options.preset == "paper" else "short"
  return DistillConfig.preset(name, **changes)
