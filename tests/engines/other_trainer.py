"""A trainer in a process of its own, which does as it is told: `other_trainer URL SEED`.

It says `held` once a refit of it is under way, and goes on after a line of its input; it says which version
it has installed, and refits again for each further line.
"""

from __future__ import annotations

import sys

import fp8sync
from tests import conftest as _environment  # noqa: F401  (sets it)
from tests.engines import serving, world
from tests.engines.test_faults import Held


class Told(Held):
    """Hands out its weights when a line comes in."""

    def storages(self) -> object:
        if not self.go.is_set():
            print("held", flush=True)
            sys.stdin.readline()
        return self._source.storages()


def main(url: str, seed: int) -> None:
    source = Told(serving.models()[seed])
    source.go.set()
    link = fp8sync.connect(source, url, world.recipe("blockwise-pow2"), timeout_s=30.0)
    while True:
        source.go.clear()
        print(link.refit().version, flush=True)
        if not sys.stdin.readline():
            return


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
