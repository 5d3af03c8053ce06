"""Golden files of the frozen interfaces; `python -m tests.golden.rewrite` writes them anew."""
