"""A tensor on the misc path goes from where its parts lie: no trainer rank gathers it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests import ports
from tests.layouts import misc_ranks

ROOT = Path(__file__).parents[2]


def test_no_rank_stands_out() -> None:
    port = ports.free()
    command = [sys.executable, "-m", "tests.layouts.misc_ranks"]
    ranks = [
        subprocess.Popen([*command, str(r), str(port)], cwd=ROOT, stdout=subprocess.PIPE)
        for r in range(3)
    ]
    said = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    assert said[2] == {"arrived": True}
    whole = misc_ranks.ROWS * misc_ranks.COLS * 2
    for rank in said[:2]:
        assert rank["error"] == "None"
        assert whole // 2 <= rank["sent"] < whole // 2 + (1 << 20)
        # A gather would add the other half. Below 0.2 GiB, beyond what they hold, nobody stands out by it.
        assert rank["grown"] < min(whole // 4, 0.2 * 2**30)
    print(f"grown by {[rank['grown'] >> 20 for rank in said[:2]]} MiB for {whole >> 20} MiB sent")
