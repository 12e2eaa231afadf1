"""Class balance: counts, evenness against its closed form, names."""

from __future__ import annotations

import numpy as np
import pytest

from kwjax.analysis.class_balance import class_balance, class_labels, images_by_count
from kwjax.errors import KwjaxError


def test_even_sets_have_as_many_effective_classes_as_classes() -> None:
  for classes in (1, 2, 7):
    found = class_balance(np.tile(np.arange(classes), 3), 10)
    assert found.effective == pytest.approx(classes)
    assert found.counts.tolist() == [3] * classes + [0] * (10 - classes)
    assert found.aimed is None


def test_an_uneven_set_lies_between() -> None:
  # p = 1/2, 1/4, 1/4: entropy 1.5 ln 2
  found = class_balance(np.array([0, 0, 1, 2]), 4, targets=np.array([0, 1, 1, 3]))
  assert found.effective == pytest.approx(2**1.5)
  assert found.aimed == 0.5


def test_names_that_two_classes_share_are_told_apart() -> None:
  found = class_balance(np.array([0, 2, 2]), 3)
  assert found.named(["crane", "dog", "crane"]) == {"crane (0)": 1, "dog": 0, "crane (2)": 2}
  assert class_labels(2, None) == ["class 0", "class 1"]
  assert images_by_count({"a": 3, "b": 0, "c": 0, "d": 1}) == {"0 images": 2, "1 image": 1, "3 images": 1}


@pytest.mark.parametrize("answers", [[], [3], [-1], [[0]]])
def test_answers_that_are_no_classes_are_refused(answers: list[int]) -> None:
  with pytest.raises(KwjaxError, match=r"in \[0, 3\)"):
    class_balance(np.array(answers, int), 3)
  with pytest.raises(KwjaxError, match="1 answers and 2 targets"):
    class_balance(np.array([0]), 3, targets=np.array([0, 1]))
