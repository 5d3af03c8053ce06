import math

import pytest
import torch

from scripts.demo.divergence import measure, nats_per_byte


def test_two_distributions_by_hand():
    engine = torch.tensor([[[0.5, 0.5]]]).log()
    trainer = torch.tensor([[[0.25, 0.75]]]).log()

    found = measure(engine, trainer)

    assert found.engine_trainer == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert found.trainer_engine == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_equal_policies_do_not_diverge():
    policy = torch.randn(2, 3, 256).log_softmax(-1)

    assert measure(policy, policy).engine_trainer == 0.0


def test_a_missing_position_is_an_error():
    with pytest.raises(ValueError, match=r"engine \(1, 2, 4\), trainer \(1, 3, 4\)"):
        measure(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4))


def test_loss_is_that_of_the_next_byte():
    windows = torch.tensor([[7, 1, 0]])
    policy = torch.tensor([[[0.1, 0.9], [0.6, 0.4]]]).log()

    assert nats_per_byte(policy, windows) == pytest.approx(-math.log(0.9 * 0.6) / 2)
