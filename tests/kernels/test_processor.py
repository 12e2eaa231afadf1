"""What programs are compiled with on a processor, and that it takes effect."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.kernels import processor
from kwjax.runtime.devices.parallel import DeviceGroup

_FLAG = "xla_cpu_prefer_vector_width"


@pytest.mark.parametrize(
  ("wide", "flags", "expected"),
  [
    (False, "", None),
    (True, "--xla_force_host_platform_device_count=8", {_FLAG: 512}),
    (True, f"--{_FLAG}=128", None),
  ],
)
def test_vectors_are_as_wide_as_the_processor_has_them_unless_the_user_said(monkeypatch, wide, flags, expected):
  monkeypatch.setattr(processor, "has_wide_vectors", lambda: wide)
  monkeypatch.setenv("XLA_FLAGS", flags)
  assert processor.compiler_options() == expected


@pytest.mark.parametrize("devices", [1, 2])
def test_programs_are_compiled_with_the_options(monkeypatch, devices):
  asked = {}
  monkeypatch.setattr("kwjax.runtime.devices.parallel.compiler_options", lambda: {_FLAG: 128})
  real = jax.jit
  monkeypatch.setattr(jax, "jit", lambda f, **options: asked.update(options) or real(f, **options))
  group = DeviceGroup(tuple(jax.devices()[:devices]))
  step = group.compile(lambda x, axis_name: 2.0 * x)
  assert asked["compiler_options"] == {_FLAG: 128}
  np.testing.assert_array_equal(group.unshard(step(group.shard(jnp.arange(4.0)))), [0.0, 2.0, 4.0, 6.0])


@pytest.mark.parametrize(
  ("text", "expected"), [("flags\t\t: fpu avx2 avx512f avx512bw\n", True), ("flags : fpu avx2\n", False), (None, False)]
)
def test_wide_vectors_are_read_off_the_system(tmp_path, monkeypatch, text, expected):
  path = tmp_path / "cpuinfo"
  if text is not None:
    path.write_text("processor : 0\n" + text)
  monkeypatch.setattr(processor, "_CPUINFO", path)
  assert processor.has_wide_vectors.__wrapped__() is expected


def test_a_layer_input_is_what_it_was_bit_by_bit() -> None:
  x = jnp.asarray([0.0, -0.0, 1.5, -jnp.inf, jnp.inf, 1e-42, jnp.nan], jnp.float32)
  found = np.asarray(jax.jit(processor.computed_once)(x))
  np.testing.assert_array_equal(found, x)
  np.testing.assert_array_equal(np.signbit(found[:-1]), np.signbit(x[:-1]))


def test_what_is_computed_once_has_the_derivative_of_the_identity() -> None:
  x = jnp.asarray([0.0, -2.0, jnp.nan])
  pull = jax.vjp(processor.computed_once, x)[1]
  np.testing.assert_array_equal(pull(jnp.arange(3.0))[0], [0.0, 1.0, 2.0])
