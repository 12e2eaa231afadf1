"""The main job in one call: images, calibration, scores, fine-tuning."""

from kwjax.compression.decisions import Decision
from kwjax.compression.recipe import Compressed, compress
from kwjax.compression.settings import FineTuning

__all__ = ["Compressed", "Decision", "FineTuning", "compress"]
