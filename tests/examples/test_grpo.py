import math

import pytest
import torch

from scripts.examples.grpo import loop
from scripts.examples.grpo.policy import Rollout, stack
from scripts.examples.grpo.task import ANSWER_BYTES, PROMPT_BYTES, Problem, draw


def test_only_the_right_sum_is_rewarded():
    problem = Problem(7, 8)

    assert bytes(problem.prompt) == b"7+8="
    assert problem.reward(list(b"15.")) == 1.0
    assert problem.reward(list(b"16.")) == 0.0
    assert problem.reward(list(b"15 ")) == 0.0


def test_all_problems_have_one_length():
    for problem in draw(50, torch.Generator().manual_seed(0)):
        assert len(problem.prompt) == PROMPT_BYTES
        assert len(problem.answer) == ANSWER_BYTES


def test_advantages_are_of_the_group():
    completions = [[([1], [-0.5]), ([2], [-0.6])], [([3], [-0.7]), ([4], [-0.8])]]
    rollout = stack([[9], [8]], completions, [[1.0, 0.0], [1.0, 1.0]])

    assert rollout.tokens.tolist() == [[9, 1], [9, 2], [8, 3], [8, 4]]
    high, low, *same = rollout.advantages().tolist()
    assert high == pytest.approx(math.sqrt(0.5), rel=1e-3)
    assert low == -high
    assert same == [0.0, 0.0]


def test_a_group_of_equal_rewards_teaches_nothing():
    rollout = Rollout(torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(1, 2))
    assert rollout.advantages().abs().max() == 0.0


def test_gain_compares_both_ends():
    assert loop.gain([0.0] * loop.EDGE + [9.0] * 5 + [0.25] * loop.EDGE) == 0.25
