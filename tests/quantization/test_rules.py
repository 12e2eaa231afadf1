"""Rules: parsing, precedence in execution order, description, JSON, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from kwjax.errors import RuleError
from kwjax.quantization import Bits, LayerRule, QuantRules


def bits(rules, network):
  return {name: (rule.weight_bits, rule.activation_bits) for name, rule in rules.resolve(network).items()}


def test_layers_come_in_execution_order_and_first_last_follow_it(network):
  found = bits(QuantRules.parse("4w3a", first_last="8w7a"), network)
  # Parameters sort as classifier, depthwise, pointwise, stem; and the classifier is created first.
  assert list(found) == ["stem", "depthwise", "pointwise", "classifier"]
  assert found == {"stem": (8, 7), "depthwise": (4, 3), "pointwise": (4, 3), "classifier": (8, 7)}


def test_first_matching_override_wins_over_first_last(network):
  rules = QuantRules.parse(
    "4w4a", first_last="8w8a", overrides={"1x1": "6w6a", ".*wise": "5w32a", "last": "float", "classifier": "2w2a"}
  )
  assert bits(rules, network) == {
    "stem": (8, 8),
    "depthwise": (5, None),
    "pointwise": (6, 6),
    "classifier": (None, None),
  }


def test_first_is_the_first_convolution(make_network):
  import flax.linen as nn

  class DenseFirst(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(4, name="embed")(x)
      x = nn.Conv(4, (3, 3), name="conv")(x)
      return nn.Dense(2, name="head")(x.mean((1, 2)))

  found = bits(QuantRules.parse("4w4a", overrides={"first": "8w8a"}), make_network(DenseFirst(), (4, 4, 3)))
  assert found == {"embed": (4, 4), "conv": (8, 8), "head": (4, 4)}


def test_pattern_must_match_the_whole_path(network):
  with pytest.raises(RuleError, match=r"'wise' matches no layer of tiny.*stem, depthwise, pointwise, classifier"):
    QuantRules.parse("4w4a", overrides={"wise": "8w8a"}).resolve(network)


def test_float_bits_have_no_scheme(network):
  rules = QuantRules.parse("32w8a", overrides={"stem": "4w32a"})
  assert rules.resolve(network)["depthwise"] == LayerRule(None, 8, None)
  assert rules.resolve(network)["stem"] == LayerRule(4, None, "affine")
  assert Bits.parse("32w32a") == Bits.parse("float") == Bits(None, None)


def test_auto_scheme_follows_the_bits(network):
  rules = QuantRules.parse("2w4a", first_last="4w4a", overrides={"pointwise": "3w4a"})
  schemes = {name: rule.weight_scheme for name, rule in rules.resolve(network).items()}
  assert schemes == {"stem": "affine", "depthwise": "symfull", "pointwise": "symfull", "classifier": "affine"}
  whole = dataclasses.replace(rules, weights="integer").resolve(network)
  schemes = {name: rule.weight_scheme for name, rule in whole.items()}
  assert schemes == {"stem": "affine0", "depthwise": "midrise", "pointwise": "midrise", "classifier": "affine0"}
  fixed = QuantRules.parse("2w4a", weights="midrise").resolve(network)
  assert {rule.weight_scheme for rule in fixed.values()} == {"midrise"}


@pytest.mark.parametrize(
  "text",
  ["", "4a4w", "4w", "w4a", "1w4a", "9w4a", "4w0a", "4w16a", "4w4a ", "4W4A", "-4w4a", "٤w4a", "floatw4a", None, 4],
)
def test_bad_bits_are_refused_with_the_expected_form(text):
  with pytest.raises(RuleError, match="expected WEIGHT_BITSwACTIVATION_BITSa"):
    QuantRules.parse(text)


def test_bad_options_are_refused():
  with pytest.raises(RuleError, match=r"weight scheme 'mse'.*affine0"):
    QuantRules.parse("4w4a", weights="mse")
  with pytest.raises(RuleError, match=r"range method 'median'.*chunk"):
    QuantRules.parse("4w4a", ranges="median")
  with pytest.raises(RuleError, match=r"'conv\(' is not a regular expression"):
    QuantRules.parse("4w4a", overrides={"conv(": "8w8a"})
  with pytest.raises(RuleError, match="8x8"):
    QuantRules.parse("4w4a", first_last="8x8")
  with pytest.raises(RuleError, match="8x8"):
    QuantRules.parse("4w4a", overrides={"first": "8x8"})


def test_network_without_layers_is_refused(make_network):
  import flax.linen as nn

  class Pool(nn.Module):
    @nn.compact
    def __call__(self, x):
      return x.mean((1, 2)) * self.param("gain", nn.initializers.ones, ())

  with pytest.raises(RuleError, match="no convolution or dense layer"):
    QuantRules.parse("4w4a").resolve(make_network(Pool(), (4, 4, 3)))


def test_describe():
  assert (
    QuantRules.parse("4w4a", first_last="8w8a").describe() == "4w4a, first/last 8w8a, weights affine, ranges sample"
  )
  assert QuantRules.parse("4w32a", weights="sym").describe() == "4w32a, weights sym"
  assert QuantRules.parse("float").describe() == "float"
  mixed = QuantRules.parse("2w4a", first_last="4w4a", overrides={"1x1": "8w8a"}, ranges="chunk")
  expected = (
    "2w4a, first/last 4w4a, 1x1 8w8a, weights symfull at 2 bit and affine at 4 bit and affine at 8 bit, ranges chunk"
  )
  assert mixed.describe() == expected


def test_json_round_trip_and_hash():
  rules = QuantRules.parse(
    "4w32a", first_last="8w8a", overrides={"a.*": "float", "1x1": "3w5a"}, weights="sym", ranges="chunk"
  )
  again = QuantRules.from_json(json.loads(json.dumps(rules.to_json())))
  assert again == rules
  assert hash(again) == hash(rules)
  assert QuantRules.parse("4w4a") != QuantRules.parse("4w4a", ranges="chunk")


def test_bad_json_is_refused():
  good = QuantRules.parse("4w4a").to_json()
  for bad in (
    [],
    {**good, "extra": 1},
    {k: v for k, v in good.items() if k != "ranges"},
    {**good, "overrides": {"a": "8w8a"}},
  ):
    with pytest.raises(RuleError, match=r"keys|pairs"):
      QuantRules.from_json(bad)
  with pytest.raises(RuleError, match="cannot read bits 3"):
    QuantRules.from_json({**good, "bits": 3})
