import math

import pytest
import torch

from scripts.demo.corpus import HELD_OUT_FILES, decode, encode, nats_per_byte, read_corpus


@pytest.fixture
def library(tmp_path):
    (tmp_path / "LICENSE.txt").write_bytes(b"L" * 50)
    (tmp_path / "abc.py").write_bytes(bytes(range(100, 200)))
    (tmp_path / HELD_OUT_FILES[0]).write_bytes(bytes(range(100)))
    return tmp_path


def test_held_out_text_is_not_trained_on(library):
    corpus = read_corpus(library)

    assert bytes(corpus.train.tolist()) == b"L" * 50 + b"\n" + bytes(range(100, 200))
    assert bytes(corpus.held_out.tolist()) == bytes(range(100))


def test_evaluation_windows_span_the_held_out_text(library):
    windows = read_corpus(library).evaluation_windows(3, 10)

    assert windows[:, 0].tolist() == [0, 45, 90]
    assert windows[-1].tolist() == list(range(90, 100))


def test_batches_follow_the_seed(library):
    corpus = read_corpus(library)
    first, again, other = (
        corpus.batch(4, 8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )

    assert first.shape == (4, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_folder_without_sources_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read_corpus(tmp_path)


def test_the_running_python_ships_enough_text():
    corpus = read_corpus()

    assert len(corpus.train) > 1_000_000
    assert len(corpus.held_out) > 50_000


def test_text_is_its_bytes():
    assert decode(encode("naïve")) == "naïve"
    assert decode([0xFF, 0x61]) == "\ufffda"


def test_loss_is_that_of_the_next_byte():
    windows = torch.tensor([[7, 1, 0]])
    policy = torch.tensor([[[0.1, 0.9], [0.6, 0.4]]]).log()

    assert nats_per_byte(policy, windows) == pytest.approx(-math.log(0.9 * 0.6) / 2)
