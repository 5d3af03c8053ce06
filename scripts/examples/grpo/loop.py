"""The loop: roll out in vLLM, learn in the trainer, refit, again."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import fp8sync
from fp8sync.engines.vllm import probe
from scripts.demo import engine
from scripts.examples.grpo.policy import Policy, stack
from scripts.examples.grpo.task import ANSWER_BYTES, draw

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scripts.examples.grpo.policy import Rollout
    from scripts.examples.grpo.task import Problem

PROMPTS = 32
COMPLETIONS = 8
EDGE = 20
"""Steps at either end whose mean rewards are compared."""
GAIN = 0.1


@dataclass(frozen=True)
class Step:
    """One step: `kl` estimates KL(engine ‖ trainer) per token, in nats, from the engine's own tokens."""

    number: int
    reward: float
    kl: float
    rollout_s: float
    learn_s: float
    refit_s: float
    pause_s: float

    def to_json(self) -> dict[str, Any]:
        """Returns the step as JSON-able data."""
        return asdict(self)


def run(seed: int, steps: int) -> Iterator[Step]:
    """Trains one policy.

    Raises:
        fp8sync.Fp8SyncError: a refit failed.
    """
    policy = Policy(seed)
    fp8 = probe.fp8_is_supported()
    recipe = fp8sync.Recipe("blockwise", dequantize=not fp8)
    llm = engine.start_engine(policy.model.config, fp8=fp8, seed=seed)
    try:
        policy.warm_start()
        fp8sync.refit(policy.model, llm, recipe=recipe)
        for number in range(steps):
            yield _step(number, policy, llm, recipe)
    finally:
        probe.stop_engine(llm)


def gain(rewards: list[float]) -> float:
    """How much the mean reward of the last steps exceeds that of the first."""
    return fmean(rewards[-EDGE:]) - fmean(rewards[:EDGE])


def _step(number: int, policy: Policy, llm: Any, recipe: fp8sync.Recipe) -> Step:
    began = time.perf_counter()
    rollout = _roll_out(llm, draw(PROMPTS, policy.generator))
    rolled = time.perf_counter()
    own = policy.learn(rollout)
    learned = time.perf_counter()
    report = fp8sync.refit(policy.model, llm, recipe=recipe)
    log_ratio = own - rollout.behaviour
    return Step(
        number=number,
        reward=rollout.rewards.mean().item(),
        # Never negative and of low variance: exp(r) - 1 - r with r = log(trainer / engine).
        kl=(log_ratio.expm1() - log_ratio).mean().item(),
        rollout_s=rolled - began,
        learn_s=learned - rolled,
        refit_s=report.seconds["total"],
        pause_s=report.pause_s,
    )


def _roll_out(llm: Any, problems: list[Problem]) -> Rollout:
    from vllm import SamplingParams

    parameters = SamplingParams(
        n=COMPLETIONS,
        max_tokens=ANSWER_BYTES,
        temperature=1.0,
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
    )
    prompts = [problem.prompt for problem in problems]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(requests, parameters, use_tqdm=False)
    completions = [[_tokens(each) for each in output.outputs] for output in outputs]
    rewards = [
        [problem.reward(ids) for ids, _ in group]
        for problem, group in zip(problems, completions, strict=True)
    ]
    return stack(prompts, completions, rewards)


def _tokens(output: Any) -> tuple[list[int], list[float]]:
    ids = list(output.token_ids)
    chosen = zip(ids, output.logprobs, strict=True)
    return ids, [by_token[token].logprob for token, by_token in chosen]
