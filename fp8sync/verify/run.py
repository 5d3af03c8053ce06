"""The whole proof on a real engine, in the order of its steps; every trainer rank runs it.

1. refit, audit: the engine holds what the trainer holds;
2. junk, refit with it, audit: every tensor differs, so none is skipped;
3. refit, audit: the digests are those of step 1;
4. divergence of the two policies, on tokens that the engine drew, and again after each of some refits
   of weights that have moved on;
5. a fresh engine, loaded from a checkpoint of the same bytes, says exactly the same.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fp8sync.errors import RecipeMismatch, TensorMismatch, UnsupportedLayout
from fp8sync.link import connect
from fp8sync.manifest import TensorInfo
from fp8sync.sources import as_source
from fp8sync.trainers import exchange, rank_and_size
from fp8sync.verify.agreement import compare
from fp8sync.verify.checkpoint import quantize_checkpoint, write_config
from fp8sync.verify.engines import start_engine
from fp8sync.verify.limits import FRESH_DIFFERENCE, exceeded, limit_of
from fp8sync.verify.weights import junk, scaled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8sync.plan import Plan
    from fp8sync.recipe import Recipe
    from fp8sync.report import RefitReport
    from fp8sync.verify.engines import Local, Served
    from fp8sync.verify.limits import Limit
    from fp8sync.verify.trainers import Subject

__all__ = ["Settings", "verify"]

_REFUSALS = (TensorMismatch, RecipeMismatch, UnsupportedLayout)

Result = dict[str, Any]

STEP = 0.01
"""By how much matrices grow from one of the later refits to the next: far more than by one optimizer step."""


@dataclass(frozen=True)
class Settings:
    """What to verify.

    Args:
        recipe: of the link.
        rows: token sequences to compare on.
        length: of each.
        steps: refits of moved weights, for divergence and error over refits.
        seed: of prompts and sampling.
        engine: options of `vllm.LLM`, such as `tensor_parallel_size`.
        host: address of the rendezvous; trainer ranks of other nodes have to reach it.
        fp8_parameters: whether the trainer's weights are rounded to FP8, unlike its policy's.
        saved: a BF16 checkpoint of the trainer's weights, for the fresh load; left out without one.
        engine_at: folder shared with a host (`fp8sync.verify.host`) that serves the engine; without, it
            runs where trainer rank 0 does.
    """

    recipe: Recipe
    rows: int = 8
    length: int = 64
    steps: int = 2
    seed: int = 0
    engine: dict[str, Any] = field(default_factory=dict)
    fp8_parameters: bool = False
    saved: Path | None = None
    host: str = "127.0.0.1"
    engine_at: Path | None = None

    def start(self, directory: Path, config: Any, **more: Any) -> Local | Served:
        """Start the engine on a directory."""
        options = {"max_model_len": self.length + 8, **more, **self.engine}
        return start_engine(self.engine_at, directory, config.vocab_size, options)

    @property
    def limit(self) -> Limit:
        """What the two policies have to keep to."""
        cache = str(self.engine.get("kv_cache_dtype", ""))
        return limit_of(
            self.recipe, fp8_cache=cache.startswith("fp8"), fp8_parameters=self.fp8_parameters
        )


def verify(subject: Subject, settings: Settings) -> Result:
    """Start an engine on dummy weights, refit it, and look at it from all sides.

    Args:
        subject: the trainer; the same again afterwards.
        settings: what to verify.

    Returns:
        JSON-able figures; `failures` is empty if every limit was kept. If the two sides do not fit,
        `refused` says why, and there is nothing else.
    """
    try:
        return _verify(subject, settings)
    except _REFUSALS as error:
        refused = [error.summary, *error.violations]
        nothing: Result = {"tensors": 0, "layers": {}, "unread": {}, "links": [], "refits": []}
        about = _about(settings) | nothing | {"errors": {}, "misc": {}, "refused": refused}
        return about | {"failures": [f"refused: {each}" for each in refused]}


def _about(settings: Settings) -> Result:
    recipe, limit = settings.recipe, asdict(settings.limit)
    return {
        "recipe": recipe.name,
        "dequantized": recipe.dequantize,
        "transport": "",
        "limit": limit,
    }


def _verify(subject: Subject, settings: Settings) -> Result:
    rank, config = rank_and_size()[0], subject.config
    held = _held(subject)
    shared = settings.engine_at
    with tempfile.TemporaryDirectory(prefix="fp8sync-verify-", dir=shared) as folder:
        engine = None
        if rank == 0:
            directory = write_config(config, held, settings.recipe, Path(folder) / "dummy")
            engine = settings.start(directory, config, load_format="dummy")
        if dist.is_initialized():
            dist.barrier()  # engines of large models take longer to start than a link waits
        try:
            result, tensors, tokens, found = _prove(subject, engine, settings)
        finally:
            if engine is not None:
                engine.stop()
        if rank == 0 and settings.saved is not None:
            fresh = write_config(config, held, settings.recipe, Path(folder) / "fresh")
            pairs = {name: info.formula for name, info in held.items() if info.formula}
            quantize_checkpoint(settings.saved, fresh, tensors, settings.recipe, pairs)
            difference = _fresh_difference(fresh, tokens, found, config, settings)
            result["fresh_difference"] = difference
            if not difference <= FRESH_DIFFERENCE:
                result["failures"].append(
                    f"a fresh load: log-probabilities differ by {difference:.3g}, expected 0.0"
                )
    return result


def _held(subject: Subject) -> dict[str, TensorInfo]:
    """What the trainer's ranks hold together: a stage of a pipeline has some layers only."""
    own = as_source(subject.source).manifest().tensors.values()
    told = exchange([info.to_json() for info in own])
    return {each[0]: TensorInfo.from_json(each) for tensors in told for each in tensors}


def _prove(
    subject: Subject, engine: Local | Served | None, settings: Settings
) -> tuple[Result, Any, torch.Tensor, torch.Tensor]:
    failures: list[str] = []
    handle = engine and engine.handle
    link = connect(subject.source, handle, settings.recipe, host=settings.host)
    plan = link.plan.plan
    refits = [_refit(link.refit(), "trained")]
    snapshot = link.audit()
    failures += [f"audit: {each}" for each in snapshot.differences]
    with junk(subject.tensors, settings.seed):
        refits.append(_refit(link.refit(), "junk"))
    other = link.audit()
    sent = {name for name, info in plan.tensors.items() if not info.unused}
    skipped = sent - {d.tensor for d in other.differences} - set(snapshot.unread)
    failures += [f"audit: {name} was not overwritten by junk" for name in sorted(skipped)]
    report = link.refit()
    refits.append(_refit(report, "trained"))
    again = link.audit()
    if again != snapshot:
        failures.append("audit: other digests after junk and a second refit of the same weights")
    failures += [f"audit after junk: {each}" for each in again.differences]
    tokens = _tokens(engine, subject.config, settings)
    found = _compare(subject, engine, tokens, refits[-1], settings)
    for step in range(1, settings.steps + 1):
        with _moved(subject, 1 + STEP * step):
            refits.append(_refit(link.refit(), f"{100 * STEP * step:.3g} % larger"))
            _compare(subject, engine, tokens, refits[-1], settings)
    failures += [
        f"policies, refit {each['version']}: {fault}" for each in refits for fault in each["faults"]
    ]
    result = _about(settings) | {
        "transport": getattr(link, "transport", ""),
        "tensors": len(sent),
        "layers": {name: list(both) for name, both in snapshot.layers().items()},
        "unread": snapshot.unread,
        "links": _links(plan),
        "refits": refits,
        "errors": {t.name: t.error for t in report.tensors if t.encoding == "blockwise"},
        "misc": {t.name: t.reason for t in report.tensors if t.route == "misc"},
        "failures": failures,
    }
    if "agreement" in refits[2]:
        result["agreement"] = refits[2]["agreement"]
    link.close()
    return result, plan.tensors, tokens, found


def _compare(
    subject: Subject,
    engine: Local | Served | None,
    tokens: torch.Tensor,
    refit: Result,
    settings: Settings,
) -> torch.Tensor:
    """Add to a refit how far the two policies are apart; returns the engine's log-probabilities."""
    trainer = _log_probabilities(subject.policy, tokens)
    if engine is None:
        return trainer
    found = engine.log_probabilities(tokens)
    agreement = compare(found, trainer, tokens)
    refit |= {"agreement": agreement.to_json(), "faults": exceeded(agreement, settings.limit)}
    return found


@contextmanager
def _moved(subject: Subject, factor: float) -> Iterator[None]:
    """The trainer's matrices, and the policy's where these are others, times a factor."""
    with scaled([*subject.tensors, *subject.policy.parameters()], factor):
        yield


def _tokens(engine: Local | Served | None, config: Any, settings: Settings) -> torch.Tensor:
    """Random prompts, continued by the engine; the same on every rank."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.rows, settings.length // 4)
    prompts = torch.randint(config.vocab_size, shape, generator=generator)
    tokens = torch.zeros(settings.rows, settings.length, dtype=torch.int64)
    if engine is not None:
        tokens = engine.sample(prompts, settings.length - shape[1], settings.seed)
    if dist.is_initialized():
        dist.broadcast(tokens, 0)
    return tokens


@torch.no_grad()
def _log_probabilities(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    training = model.training
    model.train(mode=False)
    device = next(model.parameters()).device
    logits: torch.Tensor = model(input_ids=tokens.to(device)).logits
    model.train(training)
    reshard: Any = getattr(model, "reshard", None)
    if reshard is not None:  # FSDP2 keeps the root's parameters gathered, and would miss a change
        reshard()
    return logits[:, :-1].float().log_softmax(-1).cpu()


def _fresh_difference(
    directory: Path, tokens: torch.Tensor, found: torch.Tensor, config: Any, settings: Settings
) -> float:
    fresh = settings.start(directory, config)
    try:
        said = fresh.log_probabilities(tokens)
    finally:
        fresh.stop()
    return (said - found).abs().max().item()


def _links(plan: Plan) -> list[list[int]]:
    """[trainer rank, engine rank, bytes] of one refit, without what workers forward."""
    nbytes: Counter[tuple[int, int]] = Counter()
    for copy in plan.copies:
        if copy.via is None:
            nbytes[copy.source_rank, copy.destination_rank] += copy.weight_bytes + copy.scale_bytes
    return [[*link, count] for link, count in sorted(nbytes.items())]


def _refit(report: RefitReport, weights: str) -> Result:
    errors = [t.error for t in report.tensors if t.encoding == "blockwise" and t.error > 0]
    return {
        "version": report.version,
        "weights": weights,
        "bytes": report.bytes_sent,
        "pause_s": report.pause_s,
        "seconds": dict(report.seconds),
        "error": fmean(errors) if errors else None,
        "faults": [],
    }
