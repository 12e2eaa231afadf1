"""From numbers to the report of the main job: keys, tables, figures, sentences."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib.image
import numpy as np

from experiments._harness.event_log import log_report
from experiments._harness.options import Options
from experiments._harness.scoring import is_closer
from kwjax.analysis import figures
from kwjax.analysis.class_balance import class_balance, class_labels
from kwjax.network import Network
from kwjax.runtime.evaluate import wilson_interval
from kwjax.runtime.report import Picture, Tile, command_line, complete, versions, write_report
from kwjax.runtime.report_html import summary
from kwjax.runtime.tensorboard import EventLog
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
  class_names: list[str] | None = None


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
  answers: Mapping[str, Any] | None = None,
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
    "classes": _classes(job, samples, answers) if answers else None,
    **({"notes": notes} if (notes := _notes(job, scores, tuned)) else {}),
  }


def _classes(job: Facts, samples: SampleSet, answers: Mapping[str, Any]) -> dict[str, Any]:
  """What the float network says of the images, by class."""
  objective = job.config.objective
  aimed = job.config.is_optimized and (objective.inception or objective.cross_entropy)
  found = class_balance(
    np.asarray(answers["classes"]), job.network.num_classes, targets=samples.labels if aimed else None
  )
  return {
    "counts": found.named(job.class_names),
    "effective": found.effective,
    "confidence": float(np.mean(answers["confidences"])),
    "aimed": found.aimed,
  }


def _notes(job: Facts, scores: Mapping[str, Mapping[str, Score]], tuned: Score | None) -> list[str]:
  """What a reader must not overlook: a fine-tuning that made the copy worse, by more than chance does, or is not kept."""
  bits, before = job.options.bits[-1], scores[job.options.bits[-1]][job.config.scheme]
  if tuned is None:
    return []
  notes = []
  kind = "accuracy" if before["accuracy"] else "held_out"
  if before[kind] is not None and tuned[kind] is not None:
    (least, _), (_, most) = _interval(before[kind]), _interval(tuned[kind])
    if most < least:
      what = "top-1" if kind == "accuracy" else "agreement on the held-out images"
      notes.append(
        f"Fine-tuning lowered the {what} of {bits} from {before[kind]['top1']:.2%} to {tuned[kind]['top1']:.2%}. More images, "
        "more steps or a lower --distill-learning-rate may help."
      )
  if not is_closer(tuned, before):
    notes.append(
      f"The calibrated {bits} is the one that is saved: fine-tuning took its KL from the float network on the held-out images "
      f"from {before['held_out']['kl']:.3g} to {tuned['held_out']['kl']:.3g} nats."
    )
  return notes


def _interval(result: Mapping[str, Any]) -> tuple[float, float]:
  """95 % interval of a fraction of images."""
  return wilson_interval(round(result["top1"] * result["count"]), result["count"])


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
  answers: Mapping[str, Any] | None = None,
  log: EventLog | None = None,
) -> pathlib.Path:
  """Write figures, report.json and report.html into a run's folder, and the gist into a TensorBoard log; returns the page."""
  report = build(job, samples, similarity, float_result, scores, tuned, answers)
  pictures = draw(folder / "figures", job, samples, similarity, scores, tuned)
  grid = figures.image_grid(
    samples.images[: _shown(job)], folder / "figures" / "images.png", columns=8 if _is_small(job) else 4
  )
  page = write_report(report, folder, figures=pictures, images=_tiles(job, samples, answers))
  if log is not None:
    log_report(log, summary(complete(report)), report, matplotlib.image.imread(grid)[..., :3])
  return page


def _is_small(job: Facts) -> bool:
  return job.network.image_shape[0] <= 64


def _shown(job: Facts) -> int:
  """How many images the report shows."""
  return 32 if _is_small(job) else 12


def _tiles(job: Facts, samples: SampleSet, answers: Mapping[str, Any] | None) -> list[Tile]:
  """The first images, with the float network's answer and how sure it is."""
  images = samples.images[: _shown(job)]
  if answers is None:
    return [Tile(image) for image in images]
  names = class_labels(job.network.num_classes, job.class_names)
  found = zip(images, answers["classes"], answers["confidences"])
  return [Tile(image, f"{names[answer]}, {confidence:.0%}") for image, answer, confidence in found]


def draw(
  folder: pathlib.Path,
  job: Facts,
  samples: SampleSet,
  similarity: Mapping[str, Any] | None,
  scores: Mapping[str, Mapping[str, Score]],
  tuned: Score | None,
) -> dict[str, Picture]:
  """Accuracy or agreement by precision, J_KL curve, divergence by layer."""
  folder.mkdir(parents=True, exist_ok=True)
  scheme = job.config.scheme
  bars, label = _bars(job, scores, tuned)
  pictures = {
    f"{label.removesuffix(' (%)')} by precision": Picture(
      figures.accuracy_bars(bars, folder / "precision.png", ylabel=label),
      "Each group is a precision, each colour the images that the copy was calibrated with; the lines at the tops are "
      "95 % intervals.",
      "accuracy",
    )
  }
  if "jkl" in samples.history and samples.history["jkl"].shape[1] > 1:
    curve = samples.history["jkl"].mean(0)
    references = {name: entry["jkl"] for name, entry in (similarity or {}).items() if name in ("gaussian", "real")}
    pictures["J_KL while the images were optimized"] = Picture(
      figures.jkl_curve({scheme: (np.arange(len(curve)), curve)}, folder / "jkl.png", references=references),
      "Mean over the batches, of the augmented images that the network saw; lower is nearer to the training data. "
      + (f"Dashed: {' and '.join(references)} images." if references else ""),
      "jkl",
    )
  if similarity:
    shown = {name: entry["per_layer"] for name, entry in similarity.items() if name != "start"}
    worst = sorted(layers := shown.get(scheme, next(iter(shown.values()))), key=lambda layer: -layers[layer])[:3]
    pictures["Divergence by layer"] = Picture(
      figures.layer_bars(shown, folder / "layers.png"),
      f"From the input to the last BatchNorm layer. The worst of the {scheme} images: {', '.join(worst)}.",
      "jkl",
    )
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
    return (score[entry]["top1"], *_interval(score[entry]))

  sources = list(next(iter(scores.values())))
  return {bits: {data: bar(row.get(data)) for data in sources} for bits, row in rows.items()}, label
