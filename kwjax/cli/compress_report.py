"""From the result of the main job to its report: keys, tables, figures, sentences."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib.image
import numpy as np

from kwjax.analysis import figures
from kwjax.analysis.class_balance import class_balance, class_labels
from kwjax.analysis.scoring import Score, is_closer
from kwjax.analysis.similarity import owned_by_outliers
from kwjax.batchnorm import OUTLIER_NATS
from kwjax.cli.options import Options
from kwjax.compression import Compressed
from kwjax.compression.workspace import is_small
from kwjax.network import Network
from kwjax.quantization import QuantRules
from kwjax.quantization.integer import representable_weights
from kwjax.quantization.methods import Method
from kwjax.runtime.evaluate import Accuracy, Agreement, wilson_interval
from kwjax.runtime.reporting.html import summary
from kwjax.runtime.reporting.report import Picture, Tile, command_line, complete, versions, write_report
from kwjax.runtime.reporting.tensorboard import EventLog
from kwjax.synthesis import TERMS, SynthesisConfig


class Facts(NamedTuple):
  """What the report is made of.

  Attributes:
    options: the command line.
    result: of the main job.
    config: of the synthesis.
    rules: of every precision.
    method: of the calibration.
    eval_name: of the labelled images, or None.
    class_names: in the order of the logits, or None.
    similarity: J_KL of every image set by name, or None.
    answers: what the float network says of each image, see `kwjax.compression.images.answers`.
  """

  options: Options
  result: Compressed
  config: SynthesisConfig
  rules: Mapping[str, QuantRules]
  method: Method
  eval_name: str | None
  class_names: list[str] | None
  similarity: Mapping[str, Any] | None
  answers: Mapping[str, Any]

  @property
  def network(self) -> Network:
    """The float network."""
    return self.result.network


def _result(score: Score, seed: int) -> dict[str, Any]:
  accuracy = score.accuracy
  return {
    "top1": accuracy and accuracy.top1,
    "std": None,
    "seeds": [seed],
    "top5": accuracy and accuracy.top5,
    "count": accuracy and accuracy.count,
  }


def _agreement(score: Score) -> dict[str, Any]:
  """Agreement on each set of images that there was."""
  found = score.to_json()
  return {where: found[where] for where in ("held_out", "eval") if found[where] is not None}


def build(job: Facts) -> dict[str, Any]:
  """The content of report.json."""
  result, similar = job.result, job.similarity or {}
  scheme, seed, lowest = job.config.scheme, job.options.seed, job.options.bits[-1]
  scores, tuned, samples = result.calibrated, result.fine_tuned, result.images
  before = result.reconstructed.get(lowest, scores[lowest][scheme])
  seconds = float(np.sum(samples.history["seconds"]))
  agreement = {bits: {data: _agreement(score) for data, score in row.items()} for bits, row in scores.items()}
  agreement |= {f"{bits} reconstructed": {scheme: _agreement(score)} for bits, score in result.reconstructed.items()}
  if tuned is not None:
    agreement[f"{lowest} fine-tuned"] = {scheme: _agreement(tuned)}
  return {
    "network": job.network.name,
    "protocol": _protocol(job),
    "seed": seed,
    "float": result.float_score.to_json()["accuracy"],
    "jkl": {
      "start": similar.get("start", {}).get("jkl"),
      "final": similar.get(scheme, {}).get("jkl"),
      **_trimmed(similar.get("start"), similar.get(scheme)),
      "per_layer": similar.get(scheme, {}).get("per_layer"),
      "sets": job.similarity,
    },
    "synthesis": {
      "images": len(samples.images),
      "steps": job.config.steps,
      "seconds": seconds,
      "images_per_minute": len(samples.images) / seconds * 60 if seconds else None,
    },
    "calibrated": {b: {d: _result(score, seed) for d, score in row.items()} for b, row in scores.items()},
    **(
      {"reconstructed": {bits: {scheme: _result(score, seed)} for bits, score in result.reconstructed.items()}}
      if result.reconstructed
      else {}
    ),
    "distilled": {lowest: {scheme: _result(tuned, seed)}} if tuned is not None else None,
    "agreement": agreement,
    "versions": versions(),
    "command": command_line(),
    "classes": _classes(job),
    "decisions": [{"about": d.about, "choice": d.choice, "reason": d.reason} for d in result.decisions],
    **({"notes": notes} if (notes := notes_of(lowest, before, tuned)) else {}),
  }


def _classes(job: Facts) -> dict[str, Any]:
  """What the float network says of the images, by class."""
  objective = job.config.objective
  aimed = job.config.is_optimized and (objective.inception or objective.cross_entropy)
  found = class_balance(
    np.asarray(job.answers["classes"]),
    job.network.num_classes,
    targets=job.result.images.labels if aimed else None,
  )
  return {
    "counts": found.named(job.class_names),
    "effective": found.effective,
    "confidence": float(np.mean(job.answers["confidences"])),
    "aimed": found.aimed,
  }


def _trimmed(start: Mapping[str, Any] | None, final: Mapping[str, Any] | None) -> dict[str, float]:
  """J_KL without outliers, where they have a part of it worth mentioning."""
  if not start or not final or not owned_by_outliers(final["jkl"], final["trimmed"]):
    return {}
  return {"start_trimmed": start["trimmed"], "final_trimmed": final["trimmed"]}


def notes_of(bits: str, before: Score, tuned: Score | None) -> list[str]:
  """What a reader must not overlook: a fine-tuning that made the student worse, by more than chance does, or is not kept."""
  if tuned is None:
    return []
  notes = []
  kind = "accuracy" if before.accuracy else "held_out"
  first, then = getattr(before, kind), getattr(tuned, kind)
  if first is not None and then is not None:
    (least, _), (_, most) = _interval(first), _interval(then)
    if most < least:
      what = "top-1" if kind == "accuracy" else "agreement on the held-out images"
      notes.append(
        f"Fine-tuning lowered the {what} of {bits} from {first.top1:.2%} to {then.top1:.2%}. More images, "
        "more steps or a lower --distill-learning-rate may help."
      )
  if not is_closer(tuned, before):
    assert tuned.held_out is not None
    assert before.held_out is not None
    notes.append(
      f"The calibrated {bits} is the one that is saved: fine-tuning took its KL from the float network on the held-out images "
      f"from {before.held_out.kl:.3g} to {tuned.held_out.kl:.3g} nats."
    )
  return notes


def _interval(found: Accuracy | Agreement) -> tuple[float, float]:
  """95 % interval of a fraction of images."""
  return wilson_interval(round(found.top1 * found.count), found.count)


def _protocol(job: Facts) -> dict[str, Any]:
  network, config, result = job.network, job.config, job.result
  sets = ", ".join(f"{len(images)} {data}" for data, images in result.image_sets.items())
  last = job.options.bits[-1]
  final = result.students[last]
  kind = "reconstructed" if last in result.reconstructed else "calibrated"
  kind = "fine-tuned" if result.keeps_fine_tuned else kind
  whole = f"{len(representable_weights(final))} of {len(job.rules[last].resolve(network))}"
  method = job.method.describe()
  rules = [", ".join([rule.describe(), *([method] if method else [])]) for rule in job.rules.values()]
  return {
    "teacher": f"{network.name}, float32, {network.source.get('file', 'weights of unknown origin')}",
    "weights sha256": network.source.get("sha256"),
    "quantization": "; ".join(rules),
    "data used": "none: images come from the network itself"
    + (
      "" if job.options.real_data is None else f"; the rows 'real' are a comparison that uses {job.options.real_data}"
    ),
    "calibration images": sets,
    "held-out images": f"{len(result.images.images) - result.used} {config.scheme} images, used for agreement only; "
    f"they favour {config.scheme}",
    "evaluation images": job.eval_name,
    "J_KL": "clean images, BatchNorm in evaluation mode, mean over layers of channel means, the input counted as a layer",
    "scheme": _scheme(config),
    "saved network": f"{final.name}, {kind}, {whole} layers with integer weights beside the float ones",
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


def write(folder: pathlib.Path, *, job: Facts, log: EventLog | None = None) -> pathlib.Path:
  """Write figures, report.json and report.html into a run's folder, and the gist into a TensorBoard log; returns the page."""
  report = build(job)
  pictures = draw(folder / "figures", job)
  grid = figures.image_grid(
    job.result.images.images[: _shown(job)],
    folder / "figures" / "images.png",
    columns=8 if is_small(job.network) else 4,
  )
  page = write_report(report, folder, figures=pictures, images=_tiles(job))
  if log is not None:
    _log_report(log, summary(complete(report)), report, matplotlib.image.imread(grid)[..., :3])
  return page


def _log_report(log: EventLog, summary: str, report: Mapping[str, Any], picture: np.ndarray) -> None:
  """Write the run in a sentence, its protocol and command, and the image grid u8[h,w,3]."""
  protocol = "\n".join(f"- **{name}**: {value}" for name, value in report["protocol"].items())
  log.text("run/summary", summary)
  log.text("run/protocol", f"{protocol}\n- **seed**: {report['seed']}\n\n`{report['command']}`")
  log.image("run/images", picture)


def _shown(job: Facts) -> int:
  """How many images the report shows."""
  return 32 if is_small(job.network) else 12


def _tiles(job: Facts) -> list[Tile]:
  """The first images, with the float network's answer and how sure it is."""
  names = class_labels(job.network.num_classes, job.class_names)
  found = zip(job.result.images.images[: _shown(job)], job.answers["classes"], job.answers["confidences"])
  return [Tile(image, f"{names[answer]}, {confidence:.0%}") for image, answer, confidence in found]


def draw(folder: pathlib.Path, job: Facts) -> dict[str, Picture]:
  """Accuracy or agreement by precision, J_KL curve, divergence by layer."""
  folder.mkdir(parents=True, exist_ok=True)
  scheme, samples, similarity = job.config.scheme, job.result.images, job.similarity
  bars, label = _bars(job)
  pictures = {
    f"{label.removesuffix(' (%)')} by precision": Picture(
      figures.accuracy_bars(bars, folder / "precision.png", ylabel=label),
      "Each group is a precision, each colour the images that the student was calibrated with; the lines at the tops are "
      "95 % intervals.",
      "accuracy",
    )
  }
  if "jkl" in samples.history and samples.history["jkl"].shape[1] > 1:
    curve, trimmed = (samples.history[name].mean(0) for name in ("jkl", "jkl_trimmed"))
    has_outliers, kind = owned_by_outliers(curve[-1], trimmed[-1]), "jkl"
    if has_outliers:
      curve, kind = trimmed, "trimmed"
    references = {name: entry[kind] for name, entry in (similarity or {}).items() if name in ("gaussian", "real")}
    pictures["J_KL while the images were optimized"] = Picture(
      figures.jkl_curve({scheme: (np.arange(len(curve)), curve)}, folder / "jkl.png", references=references),
      "Mean over the batches, of the augmented images that the network saw; lower is nearer to the training data. "
      + (f"Dashed: {' and '.join(references)} images. " if references else "")
      + (f"Outliers, channels above {OUTLIER_NATS:.0f} nats, are left out." if has_outliers else ""),
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


def _bars(job: Facts) -> tuple[dict[str, dict[str, tuple[float, float, float] | None]], str]:
  rows: dict[str, dict[str, Score]] = {bits: dict(row) for bits, row in job.result.calibrated.items()}
  for bits, score in job.result.reconstructed.items():
    rows[f"{bits} rec."] = {job.config.scheme: score}
  if job.result.fine_tuned is not None:
    rows[f"{job.options.bits[-1]} tuned"] = {job.config.scheme: job.result.fine_tuned}
  labelled = all(score.accuracy for row in rows.values() for score in row.values())
  entry, label = ("accuracy", "top-1 (%)") if labelled else ("held_out", "agreement with float, held-out (%)")

  def bar(score: Score | None) -> tuple[float, float, float] | None:
    found = score and getattr(score, entry)
    return (found.top1, *_interval(found)) if found else None

  sources = list(job.result.image_sets)
  return {bits: {data: bar(row.get(data)) for data in sources} for bits, row in rows.items()}, label
