"""Write the golden files anew, on purpose: `python -m tests.golden.rewrite`.

A change here is a change of the wire format: see docs/wire-format.md, "Changing it".
"""

from __future__ import annotations

from pathlib import Path

from tests.golden.cases import FILES


def main() -> None:
    folder = Path(__file__).parent
    for name, make in FILES.items():
        path = folder / name
        before = path.read_text(encoding="utf-8") if path.exists() else None
        text = make()
        path.write_text(text, encoding="utf-8")
        print(f"{name}: {'unchanged' if text == before else 'written'}")


if __name__ == "__main__":
    main()
