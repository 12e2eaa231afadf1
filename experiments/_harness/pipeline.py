"""The main job: synthesize, measure, calibrate, compare, fine-tune, report."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments._harness import cost, memory, results, stages
from experiments._harness.calibration import Method, calibrated_copy, method_of, weight_reading_of
from experiments._harness.common import Stages, get_network, in_workdir, say, start
from experiments._harness.options import (
  Options,
  Sizes,
  class_names,
  result_settings,
  run_folder,
  sizes,
  synthesis_config,
)
from experiments._harness.scoring import Scorer, is_closer, is_near
from experiments._harness.stages import (
  CALIBRATION_KEY,
  DISTILL_KEY,
  GAUSSIAN,
  GAUSSIAN_KEY,
  REAL,
  SYNTHESIS_KEY,
  Site,
  distill_config,
  fine_tuned,
  make_images,
  spread_images,
)
from kwjax.errors import KwjaxError
from kwjax.network import Network
from kwjax.quantization import QuantizedNetwork, QuantRules, save_quantized
from kwjax.quantization.integer import representable_weights
from kwjax.runtime import processes
from kwjax.runtime.data import ImageData, load_data
from kwjax.runtime.files import canonical_json, settings_differences
from kwjax.runtime.tensorboard import open_log
from kwjax.runtime.workdir import Shutdown
from kwjax.synthesis import SynthesisConfig, starting_images


class Job(NamedTuple):
  """Everything the job's stages need."""

  options: Options
  site: Site
  chosen: Sizes
  config: SynthesisConfig
  rules: dict[str, QuantRules]
  eval_data: ImageData | None
  real_data: ImageData | None
  class_names: list[str] | None = None

  def key(self, stream: int) -> jax.Array:
    """PRNG key of one stage."""
    return stages.stream_key(self.options.seed, stream)

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
  group = start(options.devices, options.coordinator, options.num_processes, options.process_id)
  network = get_network(options, default=default)
  rules = parse_rules(options, network)
  chosen = sizes(options, network)
  config = synthesis_config(options, network, chosen)
  eval_data, real_data = _load(options.eval_data, network), _load(options.real_data, network)
  names = class_names(options, network)
  folder = run_folder(name, options, network)
  need = memory.predict(network, config, chosen, group.size)
  if options.dry_run and processes.is_main():
    labelled = len(eval_data) if eval_data else 0
    print(cost.describe(network, config, chosen, tuple(rules), folder, labelled=labelled, need=need))
  memory.check(need, group.local.devices)
  if options.dry_run:
    return 0
  check_same_settings(options, network)

  def work(folder: pathlib.Path, shutdown: Shutdown) -> None:
    finished = Stages(folder, result_settings(options, network))
    # Said under the lock and with signals handled: from here on the folder is this run's, and a stop is an orderly one.
    say(f"{network.name}: {config.scheme} images, then {', '.join(rules)}; everything goes to {folder}")
    with open_log(folder / "tensorboard" if options.tensorboard and processes.is_main() else None) as log:
      pace = options.checkpoint_seconds, options.checkpoint_steps
      site = Site(network, group, finished, shutdown, folder, *pace, log)
      execute(Job(options, site, chosen, config, rules, eval_data, real_data, names))

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
      weights=weight_reading_of(options),
    )
    for bits in options.bits
  }
  rules = {bits: method_of(options).applied(rule) for bits, rule in rules.items()}
  for rule in rules.values():
    rule.resolve(network)
  return rules


def _load(spec: str | None, network: Network) -> ImageData | None:
  if spec is None:
    return None
  return load_data(spec, image_shape=network.image_shape, num_classes=network.num_classes)


def execute(job: Job) -> None:
  """Run every stage that is not done yet, and write the report."""
  site, scheme = job.site, job.config.scheme
  samples = make_images(site, job.config, "synthesis", count=job.total, key=job.key(SYNTHESIS_KEY))
  calibration: dict[str, np.ndarray] = {scheme: samples.images[: job.chosen.images]}
  if scheme != GAUSSIAN:
    noise = SynthesisConfig.preset(GAUSSIAN)
    gaussian = make_images(site, noise, GAUSSIAN, count=job.total, key=job.key(GAUSSIAN_KEY))
    calibration[GAUSSIAN] = gaussian.images[: job.chosen.images]
  if job.real_data is not None:
    calibration[REAL] = spread_images(job.real_data, job.chosen.images)
  held_out = samples.images[job.chosen.images :]
  similarity = site.stages.once("similarity", lambda: _similarities(job, calibration))
  answers = site.stages.once("answers", lambda: stages.answers(site, samples.images))
  say(
    "measuring the float network"
    if job.eval_data
    else "no --eval-data: agreement is measured on held-out synthetic images"
  )
  scorer = Scorer(site.network, held_out, job.eval_data, devices=site.group, should_stop=site.should_stop)
  float_result = site.stages.once("float", lambda: scorer.score(site.network))
  quantized, scores = calibrate_all(job, calibration, scorer)
  lowest = job.options.bits[-1]
  tuned = fine_tune(job, quantized[lowest][scheme], scores[lowest][scheme], calibration[scheme], scorer)
  keeps_tuned = tuned is not None and is_closer(tuned[1], scores[lowest][scheme])
  if tuned is not None and not keeps_tuned:
    say("fine-tuning has brought it no closer to the float network on the held-out images: the calibrated copy is kept")
  say("writing the report")
  if not processes.is_main():
    return
  final = tuned[0] if tuned is not None and keeps_tuned else quantized[lowest][scheme]
  save_quantized(final, site.stages.folder / "quantized")
  results.write(
    site.stages.folder,
    job=results.Facts(
      network=site.network,
      options=job.options,
      config=job.config,
      rules={bits: _described(rule, method_of(job.options)) for bits, rule in job.rules.items()},
      calibration={data: len(images) for data, images in calibration.items()},
      held_out=len(held_out),
      eval_name=job.eval_data.name if job.eval_data else None,
      final_name=f"{final.name}, {'fine-tuned' if keeps_tuned else 'calibrated'}",
      integers=f"{len(representable_weights(final))} of {len(job.rules[lowest].resolve(site.network))} layers "
      "with integer weights beside the float ones",
      class_names=job.class_names,
    ),
    samples=samples,
    answers=answers,
    similarity=similarity,
    float_result=float_result,
    scores=scores,
    tuned=tuned[1] if tuned else None,
    log=site.log,
  )
  say(f"done: {site.stages.folder / 'report.html'}")


def _described(rules: QuantRules, method: Method) -> str:
  return ", ".join([rules.describe(), *([method.describe()] if method.describe() else [])])


def _similarities(job: Job, calibration: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
  """J_KL of every image set, and of where the synthesis started; None without BatchNorm."""
  sets: dict[str, Callable[[], np.ndarray | jax.Array]] = {
    name: functools.partial(np.asarray, images) for name, images in calibration.items()
  }
  if job.config.is_optimized:
    count = min(job.config.batch_size, job.total)
    start = functools.partial(
      starting_images, job.site.network, job.config, count=count, key=job.key(SYNTHESIS_KEY), devices=job.site.group
    )
    sets = {"start": start, **sets}
  found = {}
  for name, images in sets.items():
    result = stages.similarity(job.site, images())
    if result is None:
      return None
    found[name] = result
  return found


def calibrate_all(
  job: Job, calibration: Mapping[str, np.ndarray], scorer: Scorer
) -> tuple[dict[str, dict[str, QuantizedNetwork]], dict[str, dict[str, Any]]]:
  """Every precision with every image set: `{bits: {data: network}}` and `{bits: {data: score}}`.

  What is observed of an image set serves all precisions: the ranges are those of the float network.
  """
  site = job.site
  method = method_of(job.options)
  quantized: dict[str, dict[str, QuantizedNetwork]] = {}
  scores: dict[str, dict[str, Any]] = {}
  for bits, rules in job.rules.items():
    quantized[bits], scores[bits] = {}, {}
    for data, images in calibration.items():
      key = job.key(CALIBRATION_KEY)
      network = calibrated_copy(site, f"ranges-{data}", images, rules, method, job.chosen, key=key, words=data)
      quantized[bits][data] = network
      scores[bits][data] = site.stages.once(f"calibrated-{bits}-{data}", functools.partial(scorer.score, network))
      say(f"calibrated {bits} with {data}: {results.in_words(scores[bits][data])}")
  return quantized, scores


def fine_tune(
  job: Job, student: QuantizedNetwork, calibrated: results.Score, images: np.ndarray, scorer: Scorer
) -> tuple[QuantizedNetwork, dict[str, Any]] | None:
  """Distill the float network into the last precision of --bits, whose score is `calibrated`.

  Returns:
    the tuned network and its score, or None for 0 steps.
  """
  if job.chosen.distill_steps == 0:
    return None
  near = method_of(job.options).corrects_variance and is_near(calibrated)
  config = distill_config(job.options, job.site.network, job.chosen, job.config.scheme, near=near)
  if job.options.preset != "paper" and config.batch_norm == "train" and job.site.network.image_shape[0] <= 64:
    # ResNet-20, 2w4a, 120 steps on 380 BNS images: 86.14 % with the stages, 75.32 without. Not measured on large images, whose
    # stages have so many elements that this weight would leave nothing of KL.
    config = config.replace(iq_weight=1e-2, iq_reduction="sum")
  tuned = fine_tuned(job.site, student, images, config, key=job.key(DISTILL_KEY))
  score = job.site.stages.once("distilled", lambda: scorer.score(tuned))
  say(f"fine-tuned {student.name}: {results.in_words(score)}")
  return tuned, score
