"""A small GRPO loop on sums: trainer and vLLM apart, rollouts by vLLM, a refit at every step.

python scripts/examples/grpo/run.py --seed 0 --json reports/grpo-0.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path


def main() -> int:
    """Run it; 0 if the mean reward of the last steps exceeds that of the first by enough."""
    import torch

    from fp8sync.doctor import environment
    from scripts.examples.grpo import loop

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, help="where to write the curves")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    done = []
    for step in loop.run(options.seed, options.steps):
        done.append(step)
        print(
            f"step {step.number:4}  reward {step.reward:.3f}  KL(engine ‖ trainer) {step.kl:.1e}  "
            f"rollout {step.rollout_s:.2f} s, learn {step.learn_s:.2f} s, refit {step.refit_s:.2f} s",
            flush=True,
        )
    gain = loop.gain([step.reward for step in done])
    seconds = time.perf_counter() - began
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"seed": options.seed, "gain": gain, "seconds": seconds}
        steps = [step.to_json() for step in done]
        result |= {"versions": environment(), "steps": steps}
        options.json.write_text(json.dumps(result), encoding="utf-8")
    print(f"seed {options.seed}: reward +{gain:.3f} (limit {loop.GAIN:g}) in {seconds:.0f} s")
    return 0 if gain >= loop.GAIN else 1


# vLLM's processes import this file again, under another name: they need nothing of the example.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    sys.exit(main())
