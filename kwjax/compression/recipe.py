"""The main job: images out of a network, students calibrated on them, scores, the last student fine-tuned where that helps."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from kwjax.analysis.scoring import NEAR_NATS, Score, Scorer, is_closer, is_near
from kwjax.compression import candidates, decisions, plan, student
from kwjax.compression.decisions import Decision
from kwjax.compression.images import make_images, spread_images
from kwjax.compression.plan import Baselines, EvalData, Images, Plan
from kwjax.compression.settings import FineTuning
from kwjax.compression.workspace import (
  CALIBRATION_KEY,
  DISTILL_KEY,
  GAUSSIAN_KEY,
  SYNTHESIS_KEY,
  VIEWS_KEY,
  Workspace,
  is_small,
  never_stop,
)
from kwjax.distillation import DistillConfig
from kwjax.network import Network
from kwjax.quantization import QuantizedNetwork
from kwjax.quantization.methods import Method
from kwjax.reconstruction import ReconstructConfig
from kwjax.runtime.devices import memory, processes
from kwjax.runtime.devices.parallel import DeviceGroup, device_group
from kwjax.runtime.reporting.tensorboard import EventLog
from kwjax.runtime.result_store import ResultStore, check_same_settings
from kwjax.synthesis import SampleSet, SynthesisConfig, enlarge

# A reconstructed student below it has nothing to gain from a short fine-tuning. ResNet-20 has 0.28 at 4w4a and 0.88 at 2w4a.
_NEAR_RECONSTRUCTED = 0.5


@dataclasses.dataclass(frozen=True)
class Compressed:
  """What `compress` made of a network, how good it is, and why it is as it is.

  Attributes:
    network: the float network.
    students: the quantized network of every precision; of the last one the fine-tuned, where that is closer.
    scores: how good each of them is.
    images: all images; the first `used` of them calibrated the students, the others were held out.
    used: number of images that calibrated.
    scheme: how the images were made, or "given".
    decisions: what was decided, in the order in which it was; each is a sentence with a reason.
    float_score: of the float network; its accuracy is None without labelled images.
    calibrated: scores after the calibration, `{precision: {image set: Score}}`, those of baselines too.
    reconstructed: scores of the precisions whose reconstruction is kept.
    fine_tuned: score of the last precision after its fine-tuning, kept or not; None without one.
    image_sets: `{image set: f32[n,h,w,c]}`, the images that calibrated.
  """

  network: Network
  students: Mapping[str, QuantizedNetwork]
  scores: Mapping[str, Score]
  images: SampleSet
  used: int
  scheme: str
  decisions: tuple[Decision, ...]
  float_score: Score
  calibrated: Mapping[str, Mapping[str, Score]]
  reconstructed: Mapping[str, Score]
  fine_tuned: Score | None
  image_sets: Mapping[str, np.ndarray] = dataclasses.field(repr=False)

  @property
  def keeps_fine_tuned(self) -> bool:
    """Whether the student of the last precision is the fine-tuned one."""
    last = list(self.calibrated)[-1]
    before = self.reconstructed.get(last, self.calibrated[last][self.scheme])
    return self.fine_tuned is not None and is_closer(self.fine_tuned, before)

  def summary(self) -> str:
    """Scores and decisions, a line each."""
    lines = [f"{bits}: {score.describe()}" for bits, score in self.scores.items()]
    return "\n".join([*lines, *map(str, self.decisions)])


def compress(
  network: Network,
  bits: Sequence[str] = ("8w8a", "4w4a"),
  *,
  key: jax.Array,
  images: Images | None = None,
  scheme: str = "bns",
  calibration: str | Method = "best",
  first_last: str | None = "8w8a",
  overrides: Mapping[str, str] | Sequence[tuple[str, str]] = (),
  weights: str | None = None,
  num_images: int | None = None,
  held_out: int | None = None,
  views: int = 1,
  config: SynthesisConfig | None = None,
  reconstruct: bool | ReconstructConfig = True,
  finetune: bool | FineTuning | DistillConfig = True,
  baselines: Baselines | None = None,
  eval_data: EvalData | None = None,
  workdir: str | pathlib.Path | ResultStore | None = None,
  devices: int | Sequence[jax.Device] | DeviceGroup | None = None,
  progress: bool = True,
  should_stop: Callable[[], bool] = never_stop,
  checkpoint_seconds: float = 20.0,
  checkpoint_steps: int = 200,
  events: EventLog | None = None,
) -> Compressed:
  """Compress a trained network without its data: synthesize images, calibrate, reconstruct, fine-tune, keep what is closer.

  The images come out of the network's BatchNorm statistics (`synthesize`), unless some are given. Every precision is
  calibrated on them, and those below 8 bits are reconstructed (`reconstruct`). If the last one is still far from the float
  network, it is distilled from it (`distill`). Every optional step is kept only where it lowers the KL from the float network
  on held-out images. Equal arguments give equal results. With a working folder, everything that is
  finished is kept there: killed at any moment and called again with the same arguments, it ends with the same bits.

  Args:
    network: the trained float network.
    bits: precisions, each as of `QuantRules.parse`; the last one is fine-tuned.
    key: PRNG key; everything random derives from it.
    images: take these instead of synthetic ones: f32[n,h,w,c] in [0,1], u8[n,h,w,c], an `ImageData`, or what
      `load_data` opens.
    scheme: how images are made: "bns", "inception", "bns+inception", "deepinversion" or "gaussian".
    calibration: "best": weight ranges by bits, and corrected moments unless they harm; "paper": Haroush et al. (2020); or a
      `Method`.
    first_last: bits of the first convolution and of the last layer; None treats them like the rest.
    overrides: bits of some layers, as of `QuantRules.parse`.
    weights: weight scheme, as of `QuantRules.parse`. Default: "integer"; "auto" with calibration "paper".
    num_images: images to calibrate and fine-tune with. Default: 384 up to 64 pixels, 64 beyond; of given ones, three
      quarters of an array.
    held_out: images beside them, for the agreement with the float network alone. Default: 128 or 32; at most a quarter
      of given ones.
    views: of each synthetic image to calibrate and reconstruct with. The first is the image itself. More are drawn as in the
      synthesis; they help some networks and harm others.
    config: of the synthesis. Default: what suits the size of the images.
    reconstruct: whether and how precisions below 8 bits are reconstructed. True: 150 iterations of 32 images a unit up to 64
      pixels, none beyond, where so few images can make it harm.
    finetune: whether and how the last precision is fine-tuned. True and `FineTuning` leave open what depends on how good the
      student is: one that is reconstructed and near the float network is not fine-tuned. A `DistillConfig` says everything.
    baselines: further image sets that every precision is calibrated with, for comparison only:
      `{name: images as above, or the SynthesisConfig that makes them}`.
    eval_data: images to evaluate on, used for nothing else: an `ImageData`, (images, labels), or what `load_data` opens.
    workdir: folder that keeps what is finished; None writes nothing. Or a `ResultStore` whose folder the caller has
      locked and whose settings tell this call from others.
    devices: number of devices of each process, devices, or None (all accelerators, or one CPU a process).
    progress: show lines and progress bars on the standard error stream.
    should_stop: asked between steps; when true, what is finished is kept and Interrupted is raised.
    checkpoint_seconds: least time in seconds between two saved states of the synthesis.
    checkpoint_steps: fine-tuning steps between two saved states.
    events: where curves go for TensorBoard, see `kwjax.runtime.reporting.tensorboard.open_log`.

  Returns:
    `Compressed`: students, scores, images and decisions.

  Raises:
    KwjaxError: an argument is wrong, before any work starts; or the run does not fit into memory.
    NoBatchNormError: the scheme needs BatchNorm statistics, and the network has none.
    DataError: images do not have the network's shape, or cannot be read.
    CheckpointError: the folder holds a run with other arguments (each is named), or is damaged.
    NonFiniteError: a loss or a logit became NaN or infinite.
    Interrupted: `should_stop` said so.

  Example:
    >>> network = kwjax.load_network("networks/resnet20")
    >>> result = kwjax.compress(network, bits=("4w4a",), key=jax.random.key(0))
    >>> kwjax.save_quantized(result.students["4w4a"], "networks/resnet20-4w4a")
  """
  group = device_group(devices)
  job = plan.make_plan(
    network,
    bits,
    key=key,
    images=images,
    scheme=scheme,
    calibration=calibration,
    first_last=first_last,
    overrides=overrides,
    weights=weights,
    num_images=num_images,
    held_out=held_out,
    views=views,
    config=config,
    reconstruct=reconstruct,
    finetune=finetune,
    baselines=baselines,
    eval_data=eval_data,
  )
  plan.check_pace(checkpoint_seconds, checkpoint_steps)
  memory.check(job.need(network, group.size), group.local.devices)
  with contextlib.ExitStack() as stack:
    if isinstance(workdir, ResultStore):
      results = workdir
    else:
      settings = job.settings(network)
      check_same_settings(settings)
      folder = None if workdir is None else stack.enter_context(processes.lock(workdir))
      results = ResultStore(folder, settings)
    workspace = Workspace(
      network,
      group,
      results,
      should_stop,
      results.folder,
      checkpoint_seconds,
      checkpoint_steps,
      events,
      progress,
    )
    where = "" if results.folder is None else f"; everything goes to {results.folder}"
    workspace.log(f"{network.name}: {job.scheme} images, then {', '.join(job.rules)}{where}")
    return _execute(job, workspace)


def _execute(job: Plan, workspace: Workspace) -> Compressed:
  """Everything that is not finished yet."""
  network, scheme = workspace.network, job.scheme
  samples = job.given or make_images(
    workspace, _config(job), "synthesis", count=job.total, key=jax.random.fold_in(job.key, SYNTHESIS_KEY)
  )
  used, held_out = samples.images[: job.num_images], samples.images[job.num_images :]
  calibrating = used
  if job.views > 1:
    augmentation = _config(job).augmentation
    calibrating = enlarge(used, job.views, augmentation, key=jax.random.fold_in(job.key, VIEWS_KEY))
  image_sets = {scheme: used, **{name: _baseline(job, workspace, name) for name in job.baselines}}
  kind = "held-out images" if job.given else "held-out synthetic images"
  workspace.log(
    "measuring the float network"
    if job.eval_data is not None
    else f"no labelled images: agreement is measured on {kind}"
  )
  scorer = Scorer(network, held_out, job.eval_data, devices=workspace.group, should_stop=workspace.should_stop)
  float_score = Score.from_json(workspace.results.once("float", lambda: scorer.score(network)))
  decided = [decisions.about_images(samples, None if job.given else job.config, job.num_images, job.views)]
  students: dict[str, QuantizedNetwork] = {}
  scores: dict[str, Score] = {}
  calibrated: dict[str, dict[str, Score]] = {}
  reconstructed: dict[str, Score] = {}
  for bits, rules in job.rules.items():
    calibrated[bits] = {}
    for name, images in image_sets.items():
      key, method = jax.random.fold_in(job.key, CALIBRATION_KEY), job.method
      if name == scheme:
        own = candidates.best(workspace, scorer, bits, rules, method, calibrating, key=key, name=name)
        found = own.student
      else:
        found = student.calibrated(workspace, f"ranges-{name}", images, rules, method, key=key, description=name)
      result = workspace.results.once(f"calibrated-{bits}-{name}", functools.partial(scorer.score, found))
      calibrated[bits][name] = Score.from_json(result)
      workspace.log(f"calibrated {bits} with {name}: {calibrated[bits][name].describe(kind)}")
      if name == scheme:
        students[bits] = found
    pairs = len(student.equalized(network).pairs) if job.method.equalizes else None
    decided += decisions.about_calibration(rules, job.method, network, pairs, own.tried)
    scores[bits] = calibrated[bits][scheme]
    if job.reconstruct is not None:
      made = candidates.reconstructed(
        workspace, scorer, bits, rules, job.reconstruct, own, scores[bits], calibrating, key=job.key
      )
      decided.append(made.why)
      if made.score is not None:
        students[bits], scores[bits], reconstructed[bits] = made.student, made.score, made.score
  last = list(job.rules)[-1]
  is_reconstructed = last in reconstructed
  limit = _NEAR_RECONSTRUCTED if is_reconstructed else NEAR_NATS
  near = (job.method.corrects_variance or is_reconstructed) and is_near(scores[last], limit)
  tuning = (
    None if near and is_reconstructed and isinstance(job.finetune, FineTuning) else _tuning(job, network, near=near)
  )
  decided.append(
    decisions.about_fine_tuning(last, tuning, near=near, calibrated=scores[last], wanted=job.finetune.steps != 0)
  )
  tuned_score = None
  if tuning is not None:
    key = jax.random.fold_in(job.key, DISTILL_KEY)
    tuned = student.fine_tuned(workspace, students[last], used, tuning, key=key)
    tuned_score = Score.from_json(workspace.results.once("distilled", lambda: scorer.score(tuned)))
    workspace.log(f"fine-tuned {students[last].name}: {tuned_score.describe(kind)}")
    decided.append(decisions.about_kept(last, scores[last], tuned_score))
    if is_closer(tuned_score, scores[last]):
      students[last], scores[last] = tuned, tuned_score
    else:
      workspace.log(
        "fine-tuning has brought it no closer to the float network on the held-out images: the calibrated student is kept"
      )
  return Compressed(
    network=network,
    students=students,
    scores=scores,
    images=samples,
    used=job.num_images,
    scheme=scheme,
    decisions=tuple(decided),
    float_score=float_score,
    calibrated=calibrated,
    reconstructed=reconstructed,
    fine_tuned=tuned_score,
    image_sets=image_sets,
  )


def _config(job: Plan) -> SynthesisConfig:
  assert job.config is not None
  return job.config


def _baseline(job: Plan, workspace: Workspace, name: str) -> np.ndarray:
  """Images of a baseline; those that are synthesized are as many as the others, so that equal keys give equal images."""
  baseline = job.baselines[name]
  if not isinstance(baseline, SynthesisConfig):
    return spread_images(baseline, job.num_images)
  key = jax.random.fold_in(job.key, SYNTHESIS_KEY if baseline.is_optimized else GAUSSIAN_KEY)
  return make_images(workspace, baseline, name, count=job.total, key=key).images[: job.num_images]


def _tuning(job: Plan, network: Network, *, near: bool) -> DistillConfig | None:
  """Settings of the fine-tuning, or None for none."""
  if job.finetune.steps == 0:
    return None
  if isinstance(job.finetune, DistillConfig):
    return job.finetune
  config = job.finetune.config(network, job.scheme, near=near)
  if not job.finetune.published and config.batch_norm == "train" and is_small(network):
    # ResNet-20, 2w4a, 120 steps on 380 BNS images: 86.14 % with the stages, 75.32 without. Not measured on large images, whose
    # stages have so many elements that this weight would leave nothing of KL.
    config = config.replace(iq_weight=1e-2, iq_reduction="sum")
  return config
