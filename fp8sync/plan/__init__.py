"""Pure planning: intersect two manifests, lay the copies out in buckets, explain and forecast them."""

from fp8sync.plan.amax import AmaxGroup, AmaxPart, teams
from fp8sync.plan.bucket import (
    DEFAULT_BUCKET_BYTES,
    Bucket,
    Part,
    fill_buckets,
    in_parts,
    in_turns,
    strips,
)
from fp8sync.plan.build import Plan, Planner, build_plan
from fp8sync.plan.copy import Copy
from fp8sync.plan.explain import LinkPlan, explain
from fp8sync.plan.formats import MISC, cut_pairs
from fp8sync.plan.order import Run, Stamps, in_order, messages_of, order_of, stamps_of
from fp8sync.plan.portions import in_portions

__all__ = [
    "DEFAULT_BUCKET_BYTES",
    "MISC",
    "AmaxGroup",
    "AmaxPart",
    "Bucket",
    "Copy",
    "LinkPlan",
    "Part",
    "Plan",
    "Planner",
    "Run",
    "Stamps",
    "build_plan",
    "cut_pairs",
    "explain",
    "fill_buckets",
    "in_order",
    "in_parts",
    "in_portions",
    "in_turns",
    "messages_of",
    "order_of",
    "stamps_of",
    "strips",
    "teams",
]
