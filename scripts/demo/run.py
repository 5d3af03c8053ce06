"""Entry of `make demo`. Puts the checkout on the path, so that `scripts.demo` can be imported."""

from __future__ import annotations

import sys
from pathlib import Path

# vLLM's processes import this file again, under another name: they need nothing of the demo.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from scripts.demo.stopwatch import Stopwatch

    stopwatch = Stopwatch()
    with stopwatch.phase("import"):
        from scripts.demo.main import main

    sys.exit(main(stopwatch))
