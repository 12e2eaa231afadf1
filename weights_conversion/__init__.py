"""Converts trained PyTorch networks to Flax: `convert`, or `python -m weights_conversion --help`."""

from __future__ import annotations

from weights_conversion.convert import convert
from weights_conversion.locations import embedded_checkpoint
from weights_conversion.mapping import to_flax
from weights_conversion.torch_import import load_torch_state_dict

__all__ = ["convert", "embedded_checkpoint", "load_torch_state_dict", "to_flax"]
