"""A network as one StableHLO file. Later JAX versions and StableHLO runtimes run it without its Python code."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from kwjax import kernels
from kwjax.errors import KwjaxError, WeightsError
from kwjax.export.trace import float_network, weights_of
from kwjax.network import ApplyFn, Array, Network
from kwjax.quantization.integer import QTensor
from kwjax.quantization.wrap import QuantizedNetwork, quantize_inputs

PLATFORMS = ("cpu", "cuda", "tpu")
_TRAILER = b"kwjax-stablehlo-sha256:"


class StablehloFacts(NamedTuple):
  """What a StableHLO file holds.

  Attributes:
    path: of the file.
    size: bytes.
    platforms: on which it runs.
    integer_layers: layers whose kernels are int8 in the file.
    float_layers: layers whose kernels are float32 in the file.
  """

  path: pathlib.Path
  size: int
  platforms: tuple[str, ...]
  integer_layers: tuple[str, ...]
  float_layers: tuple[str, ...]


class StablehloNetwork(NamedTuple):
  """A network from a file; call it like `Network.apply`.

  Attributes:
    call: `images f32[b,h,w,c] in [0,1] -> logits f32[b,k]`; jit, vmap over further axes and other devices work.
    image_shape: (h, w, c).
    platforms: on which it runs.
    text: the program as StableHLO in text.
  """

  call: Callable[[Any], Array]
  image_shape: tuple[int, ...]
  platforms: tuple[str, ...]
  text: Callable[[], str]

  def __call__(self, images: Any) -> Array:
    """Logits f32[b,k] of images f32[b,h,w,c] in [0,1]."""
    return self.call(images)


def export_stablehlo(
  network: Network | QuantizedNetwork,
  path: str | pathlib.Path,
  *,
  platforms: Sequence[str] = PLATFORMS,
  batch: int | None = None,
) -> StablehloFacts:
  """Write the forward pass with its weights as StableHLO: images f32[batch,h,w,c] in [0,1] to logits.

  The file is the output of `jax.export` with a checksum at its end, so `jax.export.deserialize` reads it without kwjax.
  Kernels with integer levels are int8 constants that the program multiplies by their scales. Activations are rounded as
  in the simulated network, so the arithmetic is float. Products are computed at the highest precision.

  Args:
    network: quantized, or float.
    path: of the file; its folder must exist.
    platforms: "cpu", "cuda", "rocm", "tpu".
    batch: fixed number of images, or None for any.

  Raises:
    KwjaxError: a platform is unknown, or the network cannot be lowered for an unknown number of images.
  """
  from kwjax.runtime.files import atomic_write

  known = {*PLATFORMS, "rocm"}
  if not platforms or not set(platforms) <= known:
    raise KwjaxError(f"platforms must be some of cpu, cuda, rocm, tpu, found {', '.join(platforms) or 'none'}")
  base, forward, held = _forward(network)
  count = export.symbolic_shape("batch")[0] if batch is None else batch
  images = jax.ShapeDtypeStruct((count, *base.image_shape), jnp.float32)
  try:
    # The fast forms for CPUs are many operations each, and for CPUs alone.
    with kernels.enabled(False), jax.default_matmul_precision("highest"):
      program = export.export(jax.jit(forward), platforms=tuple(platforms))(images)
  except jax.errors.InconclusiveDimensionOperation as error:
    reason = str(error).splitlines()[0]
    raise KwjaxError(
      f"{base.name} cannot be traced for any number of images, name one with batch=: {reason}"
    ) from error
  try:
    payload = bytes(program.serialize())
  except ImportError as error:
    raise KwjaxError('writing StableHLO files needs the package flatbuffers: pip install "kwjax[stablehlo]"') from error
  # JAX ignores bytes after the program.
  content = payload + _TRAILER + hashlib.sha256(payload).digest()
  try:
    atomic_write(pathlib.Path(path), content)
  except OSError as error:
    raise KwjaxError(f"cannot write {path}: {error.strerror or error}") from error
  return StablehloFacts(
    pathlib.Path(path), len(content), tuple(platforms), tuple(held["integer_layers"]), tuple(held["float_layers"])
  )


def _forward(
  network: Network | QuantizedNetwork,
) -> tuple[Network, Callable[[Array], Array], dict[str, list[str]]]:
  """The forward pass as a function of the images, with the kernels of the quantized network."""
  base, weights = float_network(network), weights_of(network)
  apply: ApplyFn = base.forward
  if isinstance(network, QuantizedNetwork):
    apply = quantize_inputs(apply, base, network.rules, network.ranges)

  def forward(images: Array) -> Array:
    params = flax.traverse_util.flatten_dict(dict(base.variables["params"]))
    for path, weight in weights.items():
      params[path] = (
        jnp.asarray(weight.value)
        if weight.integer is None
        else QTensor(*(jnp.asarray(field) for field in weight.integer)).dequantize()
      )
    variables = {**base.variables, "params": flax.traverse_util.unflatten_dict(params)}
    return apply(variables, images)[0]

  held = {
    "integer_layers": [w.layer for w in weights.values() if w.integer is not None],
    "float_layers": [w.layer for w in weights.values() if w.integer is None],
  }
  return base, forward, held


def load_stablehlo(path: str | pathlib.Path) -> StablehloNetwork:
  """Read a file of `export_stablehlo`.

  Raises:
    WeightsError: the file cannot be read, is another one, or is damaged.
    KwjaxError: the package flatbuffers is not installed.
  """
  path = pathlib.Path(path)
  try:
    content = path.read_bytes()
  except OSError as error:
    raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
  end = len(content) - len(_TRAILER) - hashlib.sha256().digest_size
  if end < 0 or content[end : end + len(_TRAILER)] != _TRAILER:
    raise WeightsError(f"{path} is not a file of export_stablehlo, or is cut off")
  payload = content[:end]
  if hashlib.sha256(payload).digest() != content[end + len(_TRAILER) :]:
    raise WeightsError(f"{path} is damaged: its content does not have the checksum it states")
  try:
    program = export.deserialize(bytearray(payload))
  except ImportError as error:
    raise KwjaxError('reading StableHLO files needs the package flatbuffers: pip install "kwjax[stablehlo]"') from error

  def call(images: Any) -> Array:
    return program.call(jnp.asarray(np.asarray(images) if isinstance(images, list) else images, jnp.float32))

  shape = tuple(int(n) for n in program.in_avals[0].shape[1:])
  return StablehloNetwork(call, shape, tuple(program.platforms), program.mlir_module)
