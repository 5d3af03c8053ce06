"""Pure planning: intersect two manifests, lay the copies out in buckets, explain them."""

from fp8sync.plan.bucket import DEFAULT_BUCKET_BYTES, Bucket, Part, fill_buckets
from fp8sync.plan.build import Copy, Plan, build_plan
from fp8sync.plan.explain import explain

__all__ = [
    "DEFAULT_BUCKET_BYTES",
    "Bucket",
    "Copy",
    "Part",
    "Plan",
    "build_plan",
    "explain",
    "fill_buckets",
]
