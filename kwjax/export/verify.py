"""Checks that an exported file computes the same as the network, on the same images."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from kwjax.errors import KwjaxError
from kwjax.intercept import Forwardable
from kwjax.runtime.devices.forwarding import padded_batches

Run = Callable[[np.ndarray], np.ndarray]
"""`images f32[n,h,w,c] in [0,1] -> logits f32[n,k]`."""


class Comparison(NamedTuple):
  """How far apart the logits of two networks are.

  Attributes:
    images: number of images compared.
    max_difference: largest absolute difference of two logits.
    rms_difference: root of the mean squared difference.
    rms_logit: root of the mean squared logit of the network, to compare with.
    agreement: share of images with the same largest logit, 0 to 1.
  """

  images: int
  max_difference: float
  rms_difference: float
  rms_logit: float
  agreement: float


def compare(expected: np.ndarray, found: np.ndarray) -> Comparison:
  """Distance of two arrays of logits f32[n,k]."""
  difference = found.astype(np.float64) - expected
  same = (expected.argmax(1) == found.argmax(1)).mean()
  rms, size = (float(np.sqrt((v.astype(np.float64) ** 2).mean())) for v in (difference, expected))
  return Comparison(len(expected), float(np.abs(difference).max()), rms, size, float(same))


def in_batches(run: Run, images: np.ndarray, batch_size: int) -> np.ndarray:
  """`run` on a few images at a time. The last batch is padded, so that files for a fixed batch can be run."""
  return np.concatenate([np.asarray(run(batch))[:count] for batch, count in padded_batches(images, batch_size)])


def network_runner(network: Forwardable) -> Run:
  """The network, compiled."""
  apply = jax.jit(lambda found, x: found.apply(x))

  def run(images: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
      return np.asarray(apply(network, images))

  return run


def onnx_runner(path: str | pathlib.Path, *, session_options: Mapping[str, str] | None = None, threads: int = 0) -> Run:
  """An ONNX file of `export_onnx` in onnxruntime, on the CPU.

  Args:
    path: of the file.
    session_options: entries of the session's configuration. The default prevents saturation of uint8 and int8 products,
      for files with `weights="int8"`.
    threads: of one operation; 0: all cores.

  Raises:
    KwjaxError: onnxruntime is not installed, or refuses the file.
  """
  try:
    import onnxruntime
  except ImportError as error:
    raise KwjaxError('running ONNX files needs the package onnxruntime: pip install "kwjax[onnx]"') from error
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads, options.log_severity_level = threads, 3
  for key, value in ({"session.x64quantprecision": "1"} if session_options is None else session_options).items():
    options.add_session_config_entry(key, value)
  try:
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
  # onnxruntime raises many classes without a common base.
  except Exception as error:
    raise KwjaxError(f"onnxruntime cannot run {path}: {str(error).splitlines()[0][:200]}") from error
  (source,) = session.get_inputs()
  first = _channels_first(source.shape)

  def run(images: np.ndarray) -> np.ndarray:
    stored = np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if first(images) else images
    return session.run(None, {source.name: stored})[0]

  return run


def _channels_first(shape: list[Any]) -> Callable[[np.ndarray], bool]:
  """Whether a model with this input shape takes images with channels first."""

  def decide(images: np.ndarray) -> bool:
    height, width, channels = images.shape[1:]
    return shape[1:] == [channels, height, width] and shape[1:] != [height, width, channels]

  return decide
