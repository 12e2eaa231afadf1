"""Where the experiments keep compiled programs."""

from __future__ import annotations

import pathlib

import jax
import pytest

from kwjax.cli.command import use_compilation_cache


@pytest.mark.parametrize("chosen", [None, "/data/programs"])
def test_programs_are_kept_unless_a_place_was_chosen(
  chosen: str | None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  set_to: dict[str, object] = {}
  monkeypatch.setattr(jax.config, "update", set_to.__setitem__)
  monkeypatch.setenv("KWJAX_CACHE", str(tmp_path))
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", chosen or "")
  use_compilation_cache()
  kept = {"jax_compilation_cache_dir": str(tmp_path / "xla"), "jax_persistent_cache_min_compile_time_secs": 0.1}
  assert set_to == ({} if chosen else kept)
