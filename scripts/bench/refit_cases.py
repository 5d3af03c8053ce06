"""The mappings of `refit.py`, by name."""

from __future__ import annotations

from dataclasses import dataclass

from refit_traffic import placed, processes_of

from fp8sync.layouts import EngineLayout, TrainerLayout

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """A mapping."""

    model: str
    trainer: TrainerLayout
    engine: EngineLayout

    @property
    def ranks(self) -> int:
        """Members: trainer ranks and workers."""
        return self.trainer.ranks + self.engine.ranks

    @property
    def kinds(self) -> set[str]:
        """Which peers it is for (`PEERS`' `only`)."""
        alone = self.trainer.fsdp == self.trainer.ranks
        sharded = alone and (self.trainer.fsdp > 1 or not self.trainer.fused)
        return {"", *["FSDP"] * sharded, *["one to one"] * (self.ranks == 2)}

    def lying(self, gpus: int) -> list[int]:
        """The GPU of each member, of so many."""
        trainers = self.trainer.ranks
        return placed(trainers // self.trainer.pp, trainers, self.engine.ranks, gpus)

    def processes(self, gpus: int) -> list[int]:
        """The process that each member is."""
        return processes_of(self.lying(gpus), gpus)


QWEN, LLAMA = "qwen3-30b-a3b", "llama-3.1-8b"
CASES = {
    "1 -> 1": Case(QWEN, TrainerLayout(), EngineLayout()),
    "1 unfused -> 1": Case(QWEN, TrainerLayout(fused=False), EngineLayout()),
    "TP2.EP2.ETP1 -> TP2": Case(QWEN, TrainerLayout(tp=2, ep=2, etp=1), EngineLayout(tp=2)),
    "TP2 -> TP2.EP2": Case(QWEN, TrainerLayout(tp=2), EngineLayout(tp=2, expert_parallel=True)),
    "FSDP2 -> TP2": Case(QWEN, TrainerLayout(dp=2, fsdp=2), EngineLayout(tp=2)),
    "TP4.EP4.ETP1 -> TP4.EP4": Case(
        QWEN, TrainerLayout(tp=4, ep=4, etp=1), EngineLayout(tp=4, expert_parallel=True)
    ),
    "TP2.PP2.EP2 -> TP4.EP4": Case(
        QWEN, TrainerLayout(tp=2, pp=2, ep=2, etp=1), EngineLayout(tp=4, expert_parallel=True)
    ),
    "llama 1 -> 2": Case(LLAMA, TrainerLayout(), EngineLayout(tp=2)),
    "llama FSDP3 -> 1": Case(LLAMA, TrainerLayout(dp=3, fsdp=3), EngineLayout()),  # cuts 128-blocks
    "llama TP2 -> TP2": Case(LLAMA, TrainerLayout(tp=2), EngineLayout(tp=2)),
    "llama TP2 -> TP4": Case(LLAMA, TrainerLayout(tp=2), EngineLayout(tp=4)),
    "llama 1 -> 4": Case(LLAMA, TrainerLayout(), EngineLayout(tp=4)),
    "llama TP4 -> TP4": Case(LLAMA, TrainerLayout(tp=4), EngineLayout(tp=4)),
}
