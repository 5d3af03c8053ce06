"""Tiny trained models for the matrix: `tiny_models.py FOLDER` saves the demo's, after a short training."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.demo.corpus import read_corpus
from scripts.demo.models import KINDS, build_model
from scripts.demo.training import Trainer

STEPS = 60


def main(folder: Path) -> None:
    text = read_corpus()
    for kind in KINDS:
        target = folder / kind
        if not (target / "model.safetensors").exists():
            trainer = Trainer(build_model(kind, 0), text, 0)
            trainer.train(STEPS, f"{kind}: training")
            trainer.model.save_pretrained(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
