"""Checks the links of every Markdown file: to files and headings always, to the web on request.

    python scripts/check_links.py              # in CI, as part of `make docs`
    python scripts/check_links.py --external   # needs the internet; `make links`

MkDocs checks what is on the site. This covers what is not, README.md and its like, and links out.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?[^)]*\)|<(https?://[^>\s]+)>")
LOCAL = re.compile(r"https?://(localhost|127\.|0\.|\[|[^/]*\.example\b)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 20.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--external", action="store_true", help="ask the web, too")
    external = parser.parse_args().external
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    found = [(path, link) for name in listed.stdout.split() for path, link in links(ROOT / name)]
    outward = sorted({link for _, link in found if link.startswith("http")})
    faults = [
        f"{path.relative_to(ROOT)}: {link}: {why}"
        for path, link in found
        if not link.startswith(("http", "mailto:")) and (why := inner_fault(path, link))
    ]
    if external:
        with ThreadPoolExecutor(8) as pool:
            answers = zip(outward, pool.map(outer_fault, outward), strict=True)
            faults += [f"{link}: {why}" for link, why in answers if why]
    print("\n".join(faults), file=sys.stderr)
    asked = "asked" if external else "not asked"
    print(f"{len(found)} links, {len(outward)} to the web, {asked}: {len(faults)} broken")
    return bool(faults)


def links(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield a file's links, those in code left out."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))
    for match in LINK.finditer(text):
        link = match[1] or match[2]
        if not LOCAL.match(link):
            yield path, link


def inner_fault(path: Path, link: str) -> str:
    """Return what is wrong with a link within the repository, or an empty string."""
    place, _, anchor = link.partition("#")
    target = (path.parent / place).resolve() if place else path
    if not target.exists():
        return "no such file"
    if not target.is_relative_to(ROOT):
        return "outside of the repository"
    if anchor and target.suffix == ".md" and anchor not in headings(target):
        return "no such heading"
    return ""


@cache
def headings(path: Path) -> frozenset[str]:
    """Return a file's anchors, made from its headings as GitHub makes them."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+?)\s*$", text, re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return frozenset(each.replace(" ", "-") for each in words)


def outer_fault(link: str) -> str:
    """Return why a page on the web cannot be had, or an empty string."""
    for method in ("HEAD", "GET"):
        request = urllib.request.Request(link, method=method, headers={"User-Agent": "Mozilla/5.0"})  # noqa: S310  (http alone comes here)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S):  # noqa: S310
                return ""
        except urllib.error.HTTPError as error:
            why = f"{error.code} {error.reason}"
            # Some servers answer no HEAD; some turn away whoever is no browser, and are there.
            if error.code in {HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS}:
                return ""
        except (OSError, ValueError) as error:
            why = str(error)
    return why


if __name__ == "__main__":
    sys.exit(main())
