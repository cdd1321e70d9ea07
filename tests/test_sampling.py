"""Rare-class sampling against hand-computed probabilities and thresholds."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from madm_utils.cli import UserError
from madm_utils.sampling import RareClassSampler, evenly_spaced, rare_class_probabilities


def test_probabilities_by_hand():
    # frequencies 0.7, 0.2, 0.1; softmax((1 - f) / 0.1) = exp of 3, 8, 9 up to a common factor
    weights = [math.exp(3), math.exp(8), math.exp(9)]
    expected = [w / sum(weights) for w in weights]
    np.testing.assert_allclose(rare_class_probabilities(np.array([70, 20, 10]), 0.1), expected, rtol=1e-12)


def test_small_temperatures_do_not_overflow():
    np.testing.assert_allclose(rare_class_probabilities(np.array([999, 1]), 1e-6), [0, 1])


COUNTS = np.array([[100, 11, 0], [100, 10, 0], [100, 30, 5], [4, 0, 0]])


def test_candidates_have_more_than_the_threshold_and_classes_without_any_are_not_drawn():
    sampler = RareClassSampler(COUNTS, temperature=0.5, min_pixels=10)
    assert list(sampler.classes) == [0, 1]
    total = COUNTS.sum()
    weights = [math.exp((1 - 304 / total) / 0.5), math.exp((1 - 51 / total) / 0.5)]
    np.testing.assert_allclose(sampler.probabilities, np.array(weights) / sum(weights), rtol=1e-12)
    rng = random.Random(0)
    draws = Counter(sampler.draw(rng) for _ in range(4000))
    assert set(draws) == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 2)}
    assert abs(sum(n for (c, _), n in draws.items() if c == 1) / 4000 - sampler.probabilities[1]) < 0.03
    assert abs(draws[1, 0] / (draws[1, 0] + draws[1, 2]) - 0.5) < 0.04


def test_candidates_that_are_frequent_only_still_have_probabilities():
    # The rarest class holds nearly all of the softmax but has no candidate image.
    sampler = RareClassSampler(np.array([[1000, 1], [1000, 0]]), temperature=1e-5, min_pixels=10)
    assert list(sampler.classes) == [0] and sampler.probabilities == [1.0]


def test_crop_needs_more_than_half_of_the_threshold():
    sampler = RareClassSampler(COUNTS, min_pixels=10)
    assert not sampler.accepts(np.array([[1] * 5, [0] * 5]), 1)
    assert sampler.accepts(np.array([[1] * 6, [0] * 6]), 1)


def test_no_candidate_at_all():
    with pytest.raises(
        UserError, match=r"none of 4 source images has more than 3000 .*largest: 100.*lower --rare_class"
    ):
        RareClassSampler(COUNTS, min_pixels=3000)


def test_evenly_spaced():
    assert list(evenly_spaced(10, 4)) == [0, 2, 5, 7]
    assert list(evenly_spaced(3, None)) == list(evenly_spaced(3, 5)) == [0, 1, 2]
