"""Images made out of a network: objective, augmentation, pixel optimization, noise, storage."""

from kwjax.synthesis.augment import Augmentation, augment
from kwjax.synthesis.config import OWN_SCHEMES, PAPER_ROWS, SCHEMES, SynthesisConfig
from kwjax.synthesis.dead_leaves_model import LEAF_SHAPES, dead_leaves
from kwjax.synthesis.noise import gaussian_images
from kwjax.synthesis.objective import TERMS, Evidence, Objective, evaluate_objective, inception_loss, smoothness_prior
from kwjax.synthesis.pixels import SynthesisState, initial_state, synthesis_loss, synthesis_step
from kwjax.synthesis.store import ImageStore
from kwjax.synthesis.store_tfds import save_tfds
from kwjax.synthesis.synthesize import SampleSet, batch_sizes, starting_images, synthesize
from kwjax.synthesis.views import enlarge

__all__ = [
  "LEAF_SHAPES",
  "OWN_SCHEMES",
  "PAPER_ROWS",
  "SCHEMES",
  "TERMS",
  "Augmentation",
  "Evidence",
  "ImageStore",
  "Objective",
  "SampleSet",
  "SynthesisConfig",
  "SynthesisState",
  "augment",
  "batch_sizes",
  "dead_leaves",
  "enlarge",
  "evaluate_objective",
  "gaussian_images",
  "inception_loss",
  "initial_state",
  "save_tfds",
  "smoothness_prior",
  "starting_images",
  "synthesis_loss",
  "synthesis_step",
  "synthesize",
]
