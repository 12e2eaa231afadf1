"""What extensions may not do; what they can is run from docs/extending.md."""

from __future__ import annotations

import dataclasses

import pytest

import kwjax
from kwjax.models import register_model
from kwjax.models.resnet_cifar import CifarResNet
from kwjax.synthesis import OWN_SCHEMES


@pytest.mark.parametrize("name", ["resnet20", "ResNet20", "my-net", " mine"])
def test_names_of_kwjax_and_misspelt_ones_are_refused(name: str) -> None:
  before = kwjax.known_models()
  with pytest.raises(kwjax.KwjaxError, match="new name"):
    register_model(dataclasses.replace(kwjax.model_info("resnet20"), name=name), CifarResNet)
  assert kwjax.known_models() == before


def test_a_scheme_is_known_only_while_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
  with pytest.raises(kwjax.KwjaxError, match="unknown scheme 'mine'"):
    kwjax.SynthesisConfig(scheme="mine")
  monkeypatch.setitem(OWN_SCHEMES, "mine", lambda size: kwjax.SynthesisConfig(scheme="mine", steps=size))
  assert kwjax.SynthesisConfig.for_network("mine", 48).steps == 48
  monkeypatch.undo()
  with pytest.raises(kwjax.KwjaxError, match="unknown scheme 'mine'"):
    kwjax.SynthesisConfig.for_network("mine", 48)
