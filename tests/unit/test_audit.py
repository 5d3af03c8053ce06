"""The audit's report, and what it concludes from values alone."""

from __future__ import annotations

import json

import torch

from fp8sync.audit.report import AuditReport, Difference, Entry, layer_of
from fp8sync.audit.units import Held


def report() -> AuditReport:
    entries = (
        Entry("model.layers.0.a.weight", 0, 5, 5),
        Entry("model.layers.0.b.weight", 0, 7, 8),
        Entry("model.norm.weight", 0, 0, 0, "loaded by the engine itself"),
    )
    place = {"coordinate": (1, 2), "expected": 0.5, "found": 0.25}
    difference = Difference("model.layers.0.b.weight", "weight", 0, (0, 0), "it is stale", **place)
    return AuditReport(entries, (difference,))


def test_layers_sum_digests() -> None:
    assert report().layers() == {"model.layers.0": (12, 13), "model.norm": (0, 0)}
    assert layer_of("model.layers.11.mlp.experts.3.up_proj.weight") == "model.layers.11"
    assert layer_of("lm_head.weight") == "lm_head"


def test_explain_names_everything() -> None:
    text = report().explain()
    assert "model.layers.0.b.weight, weight from [0, 0] (engine rank 0)" in text
    assert "at [1, 2] expected 0.5, found 0.25; it is stale" in text
    assert "not read: model.norm.weight: loaded by the engine itself" in text
    assert not report().equal


def test_report_survives_the_control_channel() -> None:
    assert AuditReport.from_json(json.loads(json.dumps(report().to_json()))) == report()


def test_reencoding_by_a_power_of_two_keeps_digests() -> None:
    """What DeepGEMM's processing may do to a pair: scale halved, codes doubled."""
    values = torch.randint(-15, 16, (256, 128)).float()  # exact as codes, and when doubled
    codes, scale_inv = values.to(torch.float8_e4m3fn), torch.full((2, 1), 0.25)
    recoded = (values * 2).to(torch.float8_e4m3fn), scale_inv / 2
    assert not torch.equal(codes.view(torch.uint8), recoded[0].view(torch.uint8))
    assert Held.of(codes, scale_inv).digests() == Held.of(*recoded).digests()


def test_negative_zero_is_zero() -> None:
    zeros = torch.tensor([0.0, -0.0, 1.0], dtype=torch.bfloat16)
    assert Held.of(zeros, None).digests() == Held.of(zeros.abs(), None).digests()


def test_every_element_counts() -> None:
    weight = torch.randn(4, 6)
    swapped = weight[[1, 0, 2, 3]]
    assert Held.of(weight, None).digests() != Held.of(swapped, None).digests()
