import math

import pytest

from scripts.demo.verdict import failures, table
from tests.demo.samples import sample_round, sample_run


def test_a_good_run_has_no_failures():
    assert failures((sample_run(sample_round(0, 7.0, 1e-2), sample_round(1, 3.1e-4, 1e-4)),)) == []


@pytest.mark.parametrize(
    ("stale", "fresh", "says"),
    [
        (7.0, 1.01e-2, ["above the limit"]),
        (2.9e-4, 1e-4, ["less than 3 times"]),
        (2e-2, 2e-2, ["above the limit", "less than 3 times"]),
        (7.0, math.nan, ["above the limit", "less than 3 times"]),
        (math.nan, 1e-4, ["less than 3 times"]),
    ],
)
def test_each_condition_is_named_with_its_model_and_round(stale, fresh, says):
    found = failures((sample_run(sample_round(2, stale, fresh), kind="moe"),))

    assert [sentence for sentence in found if not sentence.startswith("moe, round 2: ")] == []
    assert len(found) == len(says)
    assert all(words in sentence for words, sentence in zip(says, found, strict=True))


def test_the_table_has_one_line_per_round_under_its_header():
    lines = table((sample_run(sample_round(0), sample_round(1)), sample_run(kind="moe"))).split(
        "\n"
    )

    assert len(lines) == 2 + 3
    assert len({len(line) for line in lines}) == 1
    assert "2000" in lines[2]
