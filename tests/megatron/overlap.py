"""Parameters are read only once the distributed optimizer's all-gather is complete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fp8sync.sources.megatron import MegatronSource
from tests.megatron import cpu
from tests.megatron.checks import differences, gather, load, reference, refused
from tests.megatron.transfer import assemble

if TYPE_CHECKING:
    from pathlib import Path

STEPS, BATCH, LENGTH = 2, 2, 32


def check_overlap(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """After a step, an overlapping optimizer has updated only its own share of each parameter."""
    bridge, chunks = load(checkpoint, axes)
    chunks, optimizer = cpu.with_optimizer(chunks, distributed=True, overlap=True)
    source = MegatronSource(chunks, bridge)
    merged = gather(source.manifest())
    faults = _refused_without_ddp(chunks, bridge)
    for group in optimizer.chained_optimizers[0].shard_fp32_from_float16_groups:
        for master in group:
            master.mul_(1.5)
    optimizer.chained_optimizers[0]._copy_main_params_to_model_params()
    faults += refused("expected prepare() on every rank", source.storages)
    source.prepare()
    live = source.storages()
    faults += refused("expected prepare() on every rank", source.storages)
    expected = {n: (t.float() * 1.5).to(t.dtype) for n, t in reference(checkpoint).items()}
    return [*faults, *differences(assemble(merged, live), expected)]


def _refused_without_ddp(chunks: list[Any], bridge: Any) -> list[str]:
    """What DDP wraps knows of no overlap, but of DDP's hooks; evaluation takes those off."""
    (wrapper,) = chunks
    alone = MegatronSource([wrapper.module], bridge)
    said = "(overlap_param_gather); expected the chunk as DDP wraps it"
    faults = refused(said, alone.manifest) + refused(said, alone.storages)
    wrapper.disable_forward_pre_hook()
    alone.manifest()
    alone.storages()
    wrapper.enable_forward_pre_hook()
    return faults


def check_trained_with_overlap(checkpoint: Path, axes: dict[str, int]) -> list[str]:
    """Data-parallel ranks train on batches of their own: with the overlap, the same tensors after each step."""
    faults, trained = [], []
    for overlap in (False, True):
        bridge, chunks = load(checkpoint, axes)
        chunks, optimizer = cpu.with_optimizer(chunks, distributed=True, overlap=overlap)
        source = MegatronSource(chunks, bridge)
        merged = gather(source.manifest())
        shown = []
        for step in range(STEPS):
            _train(chunks, optimizer, step)
            before = [p.detach().clone() for chunk in chunks for p in chunk.parameters()]
            source.prepare()
            now = [p for chunk in chunks for p in chunk.parameters()]
            gathered = any(not torch.equal(*both) for both in zip(before, now, strict=True))
            if gathered is not overlap:
                faults.append(f"step {step}, overlap {overlap}: gathered by prepare(): {gathered}")
            shown.append(assemble(merged, source.storages()))
        trained.append(shown)
    expected = reference(checkpoint)
    if dist.get_rank() == 0:
        for one, other in zip(trained[0], [expected, *trained[0]], strict=False):
            # A step is too small for the ones of norms in BF16.
            same = [n for n in one if one[n].dim() == 2 and torch.equal(one[n], other[n])]
            faults += [f"{n}: no step moved it" for n in same]
    for step in range(STEPS):
        faults += differences(trained[1][step], trained[0][step])
    return faults


def _train(chunks: list[Any], optimizer: Any, step: int) -> None:
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    own = parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(10 * own + step)
    tokens = torch.randint(200, (BATCH, LENGTH + 1), generator=generator)
    places = torch.arange(LENGTH).expand(BATCH, LENGTH)
    (chunk,) = chunks
    with cpu.said_to_be_cuda(), cpu.one_stream():
        chunk.train()
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        chunk(inputs, places, None, labels=labels).mean().backward()
        finalize_model_grads(chunks)
        updated, norm, _ = optimizer.step()
    assert updated, f"no step was made, gradient norm {norm}"
