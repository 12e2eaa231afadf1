"""From numbers to the report of the main job: keys, tables, figures, sentences."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.options import Options
from kwjax.analysis import figures
from kwjax.network import Network
from kwjax.runtime.evaluate import wilson_interval
from kwjax.runtime.report import command_line, versions, write_report
from kwjax.synthesis import TERMS, SampleSet, SynthesisConfig

Score = Mapping[str, Any]


class Facts(NamedTuple):
  """What the report says about the protocol."""

  network: Network
  options: Options
  config: SynthesisConfig
  rules: dict[str, str]
  calibration: dict[str, int]
  held_out: int
  eval_name: str | None
  final_name: str
  integers: str


def in_words(score: Score) -> str:
  """A score in a line: accuracy where it was measured, agreement otherwise."""
  parts = []
  if score["accuracy"]:
    parts.append(f"top-1 {score['accuracy']['top1']:.2%}")
  for where, words in (("eval", "labelled images"), ("held_out", "held-out synthetic images")):
    if score[where]:
      parts.append(f"agrees with float on {score[where]['top1']:.1%} of {score[where]['count']} {words}")
  return ", ".join(parts)


def _result(score: Score, seed: int) -> dict[str, Any]:
  accuracy = score["accuracy"] or {}
  return {
    "top1": accuracy.get("top1"),
    "std": None,
    "seeds": [seed],
    "top5": accuracy.get("top5"),
    "count": accuracy.get("count"),
  }


def _agreement(score: Score) -> dict[str, Any]:
  """Agreement on each set of images that there was."""
  return {where: score[where] for where in ("held_out", "eval") if score[where] is not None}


def build(
  job: Facts,
  samples: SampleSet,
  similarity: Mapping[str, Any] | None,
  float_result: Score,
  scores: Mapping[str, Mapping[str, Score]],
  tuned: Score | None,
) -> dict[str, Any]:
  """The content of report.json."""
  scheme, seed, lowest = job.config.scheme, job.options.seed, job.options.bits[-1]
  seconds = float(np.sum(samples.history["seconds"]))
  agreement = {bits: {data: _agreement(score) for data, score in row.items()} for bits, row in scores.items()}
  if tuned is not None:
    agreement[f"{lowest} fine-tuned"] = {scheme: _agreement(tuned)}
  similar = similarity or {}
  return {
    "network": job.network.name,
    "protocol": _protocol(job),
    "seed": seed,
    "float": float_result["accuracy"],
    "jkl": {
      "start": similar.get("start", {}).get("jkl"),
      "final": similar.get(scheme, {}).get("jkl"),
      "per_layer": similar.get(scheme, {}).get("per_layer"),
      "sets": similarity,
    },
    "synthesis": {
      "images": len(samples.images),
      "steps": job.config.steps,
      "seconds": seconds,
      "images_per_minute": len(samples.images) / seconds * 60 if seconds else None,
    },
    "calibrated": {b: {d: _result(score, seed) for d, score in row.items()} for b, row in scores.items()},
    "distilled": {lowest: {scheme: _result(tuned, seed)}} if tuned is not None else None,
    "agreement": agreement,
    "versions": versions(),
    "command": command_line(),
  }


def _protocol(job: Facts) -> dict[str, Any]:
  network, config = job.network, job.config
  sets = ", ".join(f"{count} {data}" for data, count in job.calibration.items())
  return {
    "teacher": f"{network.name}, float32, {network.source.get('file', 'weights of unknown origin')}",
    "weights sha256": network.source.get("sha256"),
    "quantization": "; ".join(job.rules.values()),
    "data used": "none: images come from the network itself"
    + (
      "" if job.options.real_data is None else f"; the rows 'real' are a comparison that uses {job.options.real_data}"
    ),
    "calibration images": sets,
    "held-out images": f"{job.held_out} {config.scheme} images, used for agreement only; they favour {config.scheme}",
    "evaluation images": job.eval_name,
    "J_KL": "clean images, BatchNorm in evaluation mode, mean over layers of channel means, the input counted as a layer",
    "scheme": _scheme(config),
    "saved network": f"{job.final_name}, {job.integers}",
  }


def _scheme(config: SynthesisConfig) -> str:
  """The settings of a synthesis that differ from the plainest ones, as text."""
  if not config.is_optimized:
    return f"{config.scheme}: drawn, not optimized"
  settings = config.to_json()
  objective, views = settings.pop("objective"), settings.pop("augmentation")
  weights = [
    f"{name} {value:g}" for name, value in objective.items() if isinstance(value, float) and value and name in TERMS
  ]
  shown = [f"{name} {value}" for name, value in settings.items() if name not in ("scheme", "drop_factor") and value]
  drawn = [f"{name} {value}" for name, value in views.items() if value]
  return (
    f"{config.scheme}: terms {', '.join(weights)} ({objective['divergence']}); {', '.join(shown)}; "
    f"views: {', '.join(drawn) or 'unchanged'}"
  )


def write(
  folder: pathlib.Path,
  *,
  job: Facts,
  samples: SampleSet,
  similarity: Mapping[str, Any] | None,
  float_result: Score,
  scores: Mapping[str, Mapping[str, Score]],
  tuned: Score | None,
) -> pathlib.Path:
  """Write figures, report.json and report.html into a run's folder; returns the page."""
  report = build(job, samples, similarity, float_result, scores, tuned)
  pictures = draw(folder / "figures", job, samples, similarity, scores, tuned)
  return write_report(report, folder, figures=pictures)


def draw(
  folder: pathlib.Path,
  job: Facts,
  samples: SampleSet,
  similarity: Mapping[str, Any] | None,
  scores: Mapping[str, Mapping[str, Score]],
  tuned: Score | None,
) -> dict[str, pathlib.Path]:
  """Image grid, J_KL curve, divergence by layer, accuracy or agreement by precision."""
  folder.mkdir(parents=True, exist_ok=True)
  scheme = job.config.scheme
  small = job.network.image_shape[0] <= 64
  count = min(len(samples.images), 32 if small else 12)
  pictures = {
    f"{count} of the {scheme} images": figures.image_grid(
      samples.images[:count], folder / "images.png", columns=8 if small else 4
    )
  }
  if "jkl" in samples.history and samples.history["jkl"].shape[1] > 1:
    curve = samples.history["jkl"].mean(0)
    references = {name: entry["jkl"] for name, entry in (similarity or {}).items() if name in ("gaussian", "real")}
    pictures["J_KL of the augmented batches while optimizing"] = figures.jkl_curve(
      {scheme: (np.arange(len(curve)), curve)}, folder / "jkl.png", references=references
    )
  if similarity:
    shown = {name: entry["per_layer"] for name, entry in similarity.items() if name != "start"}
    pictures["Divergence by layer"] = figures.layer_bars(shown, folder / "layers.png")
  bars, label = _bars(job, scores, tuned)
  pictures[label] = figures.accuracy_bars(bars, folder / "precision.png", ylabel=label)
  return pictures


def _bars(
  job: Facts, scores: Mapping[str, Mapping[str, Score]], tuned: Score | None
) -> tuple[dict[str, dict[str, tuple[float, float, float] | None]], str]:
  rows = {bits: dict(row) for bits, row in scores.items()}
  if tuned is not None:
    rows[f"{job.options.bits[-1]} tuned"] = {job.config.scheme: tuned}
  labelled = all(score["accuracy"] for row in rows.values() for score in row.values())
  entry, label = ("accuracy", "top-1 (%)") if labelled else ("held_out", "agreement with float, held-out (%)")

  def bar(score: Score | None) -> tuple[float, float, float] | None:
    if score is None or score[entry] is None:
      return None
    top1, count = score[entry]["top1"], score[entry]["count"]
    return (top1, *wilson_interval(round(top1 * count), count))

  sources = list(next(iter(scores.values())))
  return {bits: {data: bar(row.get(data)) for data in sources} for bits, row in rows.items()}, label
