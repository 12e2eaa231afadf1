"""What programs are compiled with on a processor, and that it takes effect."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax import cpu
from kwjax.runtime.parallel import DeviceGroup

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
  monkeypatch.setattr(cpu, "has_wide_vectors", lambda: wide)
  monkeypatch.setenv("XLA_FLAGS", flags)
  assert cpu.compiler_options() == expected


@pytest.mark.parametrize("devices", [1, 2])
def test_programs_are_compiled_with_the_options(monkeypatch, devices):
  asked = {}
  monkeypatch.setattr("kwjax.runtime.parallel.compiler_options", lambda: {_FLAG: 128})
  real = jax.jit
  monkeypatch.setattr(jax, "jit", lambda f, **options: asked.update(options) or real(f, **options))
  group = DeviceGroup(tuple(jax.devices()[:devices]))
  step = group.compile(lambda x, axis_name: 2.0 * x)
  assert asked["compiler_options"] == {_FLAG: 128}
  np.testing.assert_array_equal(group.unshard(step(group.shard(jnp.arange(4.0)))), [0.0, 2.0, 4.0, 6.0])
