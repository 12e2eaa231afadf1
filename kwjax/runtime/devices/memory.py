"""Whether a run fits: what it will need, from the layers' shapes, against what the device and the machine have left."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from kwjax import intercept
from kwjax.errors import KwjaxError
from kwjax.network import Network

_CGROUP = pathlib.Path("/sys/fs/cgroup")
_OWN_CGROUPS = pathlib.Path("/proc/self/cgroup")
# Temporary memory of a compiled step over the activations, as XLA:CPU reports it: 0.56 and 0.70 for the synthesis with
# ResNet-20 and MobileNetV2, 2.1 for the fine-tuning with either, whose teacher and student each keep theirs.
_SYNTHESIS_SHARE, _DISTILLATION_SHARE = 0.75, 2.2
_IMAGE_SETS = 3  # the synthesized set, the Gaussian one, and a copy of either while it is put together

REMEDY = "choose fewer images or duplicates, or a smaller batch size of the synthesis or of the fine-tuning"


class Need(NamedTuple):
  """Bytes at the peak: of one device, for the largest step, and of the host, for the sets of images."""

  device: int
  host: int


def activation_bytes(network: Network) -> int:
  """Bytes that the backward pass of one image keeps: the float32 inputs of all layers with weights or statistics."""
  kept = (layer for layer in intercept.layers(network) if layer.primitive)
  return 4 * sum(int(np.prod(layer.input_shape)) * layer.repeats for layer in kept)


def predict(network: Network, *, images: int, synthesized: int, trained: int, devices: int) -> Need:
  """What a compression will need, within about a factor of two.

  Args:
    network: gives the sizes of the activations.
    images: in a set.
    synthesized: images that a step of the synthesis forwards, over all devices; 0 without a synthesis.
    trained: images that a step of the fine-tuning forwards, likewise.
    devices: number that a step is spread over.
  """
  weights = sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(network.variables))
  share = max(-(-synthesized // devices) * _SYNTHESIS_SHARE, -(-trained // devices) * _DISTILLATION_SHARE)
  # Weights, gradients, momentum and the teacher.
  step = int(share * activation_bytes(network)) + 4 * 4 * weights
  return Need(device=step, host=_IMAGE_SETS * images * 4 * int(np.prod(network.image_shape)))


def available_on_host() -> int | None:
  """Bytes that this process can still take: of the machine's memory and of its control group's; None if unknown."""
  left = []
  try:
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    left += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
  except OSError:
    if hasattr(os, "sysconf"):
      left.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
  left += _left_in_cgroups()
  return min(left, default=None)


def _left_in_cgroups() -> list[int]:
  """Bytes left below each limit of this process's control group and of those around it, version 2 and version 1."""
  found = []
  try:
    entries = [line.split(":", 2) for line in _OWN_CGROUPS.read_text().splitlines()]
  except OSError:
    return []
  for _, controllers, path in entries:
    if controllers not in ("", "memory"):
      continue
    root = _CGROUP / controllers if controllers else _CGROUP
    limit, used = (
      ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
    )
    inner = root / path.lstrip("/")
    for folder in (inner, *inner.parents):
      if not folder.is_relative_to(root):
        break
      try:
        found.append(int((folder / limit).read_text()) - int((folder / used).read_text()))
      except (OSError, ValueError):
        continue  # no such file here, or the limit is "max"
  return found


def check(need: Need, devices: Sequence[jax.Device], *, remedy: str = REMEDY) -> None:
  """Refuse a run that clearly does not fit, before hours are spent on it.

  Args:
    need: what `predict` said.
    devices: those of this process that the steps run on; the memory of CPUs is the host's, which they share.
    remedy: what needs less, for the message.

  Raises:
    KwjaxError: saying what is needed, what there is, and what needs less.
  """
  host, device = available_on_host(), devices[0]
  stats = device.memory_stats() or {} if device.platform != "cpu" else {}
  needs = {"the machine": (need.host, host)}
  if "bytes_limit" in stats:
    needs[f"a {device.device_kind}"] = (need.device, stats["bytes_limit"] - stats.get("bytes_in_use", 0))
  elif device.platform == "cpu":
    needs["the machine"] = (need.host + len(devices) * need.device, host)
  for where, (wanted, left) in needs.items():
    if left is not None and wanted > left:
      raise KwjaxError(
        f"this run needs about {wanted / 2**30:,.1f} GiB of memory, {where} has {left / 2**30:,.1f} GiB left: {remedy}"
      )
