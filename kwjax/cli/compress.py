"""`kwjax compress`: the main job for one command line, `kwjax.compress` and its report."""

from __future__ import annotations

import pathlib

import jax

from kwjax.cli import dry_run
from kwjax.cli.command import get_network, in_workdir, start
from kwjax.cli.options import (
  REMEDY,
  Options,
  config_of,
  fine_tuning_of,
  method_of,
  overrides_of,
  reconstruction_of,
  rules_of,
  sizes,
  weight_scheme_of,
)
from kwjax.cli.run_settings import class_names, result_settings, run_folder
from kwjax.compression import Compressed, compress
from kwjax.compression.images import answers, similarity
from kwjax.compression.settings import memory_need
from kwjax.compression.workspace import GAUSSIAN, REAL, SYNTHESIS_KEY, Workspace, stream_key
from kwjax.network import Network
from kwjax.optional import require
from kwjax.quantization import save_quantized
from kwjax.runtime.data import ImageData, load_data
from kwjax.runtime.devices import memory, processes
from kwjax.runtime.reporting.messages import log
from kwjax.runtime.reporting.tensorboard import open_log
from kwjax.runtime.result_store import ResultStore, check_same_settings
from kwjax.runtime.workdir import Shutdown
from kwjax.synthesis import SynthesisConfig, starting_images


def run(options: Options, *, name: str, default: str | None) -> int:
  """The whole main job for one command line.

  Args:
    options: the command line.
    name: of the command, for its folder.
    default: architecture of the embedded network that is used when none is given, or None.

  Returns:
    exit status 0.

  Raises:
    KwjaxError: anything the user can mend.
    Interrupted: the run was asked to stop.
  """
  group = start(options.devices, options.coordinator, options.num_processes, options.process_id)
  network = get_network(options.network, options.arch, options.weights, default=default)
  rules = rules_of(options, network)
  chosen = sizes(options, network)
  config = config_of(options, network, chosen)
  eval_data, real_data = _load(options.eval_data, network), _load(options.real_data, network)
  names = class_names(options, network)
  folder = run_folder(name, options, network)
  trained = chosen.distill_batch_size if chosen.distill_steps else 0
  images = chosen.images * options.views + chosen.held_out
  need = memory_need(network, config, images=images, trained=trained, devices=group.size)
  if options.dry_run and processes.is_main():
    labelled = len(eval_data) if eval_data else 0
    print(
      dry_run.describe(network, config, chosen, tuple(rules), folder, views=options.views, labelled=labelled, need=need)
    )
  memory.check(need, group.local.devices, remedy=REMEDY)
  if options.dry_run:
    return 0
  require("matplotlib", extra="report", purpose="the report of a run")
  from kwjax.cli import compress_report

  settings = result_settings(options, network)
  check_same_settings(settings)
  method = method_of(options, chosen)
  baselines: dict[str, SynthesisConfig | ImageData] = {}
  if options.scheme != GAUSSIAN:
    baselines[GAUSSIAN] = SynthesisConfig.preset(GAUSSIAN)
  if real_data is not None:
    baselines[REAL] = real_data

  def work(folder: pathlib.Path, shutdown: Shutdown) -> None:
    results = ResultStore(folder, settings)
    with open_log(folder / "tensorboard" if options.tensorboard and processes.is_main() else None) as events:
      result = compress(
        network,
        options.bits,
        key=jax.random.key(options.seed),
        scheme=options.scheme,
        calibration=method,
        first_last=options.first_last_bits(),
        overrides=overrides_of(options.overrides),
        weights=weight_scheme_of(options),
        num_images=chosen.images,
        held_out=chosen.held_out,
        views=options.views,
        config=config,
        reconstruct=reconstruction_of(chosen),
        finetune=fine_tuning_of(options, chosen),
        baselines=baselines,
        eval_data=eval_data,
        workdir=results,
        devices=group,
        should_stop=lambda: shutdown.requested,
        checkpoint_seconds=options.checkpoint_seconds,
        checkpoint_steps=options.checkpoint_steps,
        events=events,
      )
      workspace = Workspace(network, group, results, lambda: shutdown.requested, events=events)
      found = results.once("similarity", lambda: _similarities(workspace, options, config, result))
      said = results.once("answers", lambda: answers(workspace, result.images.images))
      log("writing the report")
      if not processes.is_main():
        return
      save_quantized(result.students[options.bits[-1]], folder / "quantized")
      compress_report.write(
        folder,
        job=compress_report.Facts(
          options, result, config, rules, method, eval_data.name if eval_data else None, names, found, said
        ),
        log=events,
      )
      log(f"done: {folder / 'report.html'}")

  in_workdir(folder, work, resume=options.resume)
  return 0


def _load(spec: str | None, network: Network) -> ImageData | None:
  if spec is None:
    return None
  return load_data(spec, image_shape=network.image_shape, num_classes=network.num_classes)


def _similarities(
  workspace: Workspace, options: Options, config: SynthesisConfig, result: Compressed
) -> dict[str, dict[str, object]] | None:
  """J_KL of every image set, and of where the synthesis started; None without BatchNorm."""
  sets: dict[str, object] = {}
  if config.is_optimized:
    count = min(config.batch_size, len(result.images.images))
    key = stream_key(options.seed, SYNTHESIS_KEY)
    sets["start"] = starting_images(workspace.network, config, count=count, key=key, devices=workspace.group)
  found = {}
  for name, images in {**sets, **result.image_sets}.items():
    measured = similarity(workspace, images)  # type: ignore[arg-type]
    if measured is None:
      return None
    found[name] = measured
  return found
