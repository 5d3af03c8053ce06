"""Pictures of a report in headless Chromium: `screenshots.py PAGE.html FOLDER` (docs/images, say).

Writes report-1440-light.png and report-390-dark.png: the whole page, wide and narrow, in 64 colours.
"""

from __future__ import annotations

import os
import shutil
import sys
from io import BytesIO
from pathlib import Path

VIEWS = ((1440, "light"), (390, "dark"))
COLOURS = 64
"""A page of lines and bars has few; all of them make a file three times as large."""


def main(page: Path, folder: Path) -> int:
    from PIL import Image
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width, scheme in VIEWS:
            view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            view.goto(page.resolve().as_uri())
            taken = Image.open(BytesIO(view.screenshot(full_page=True))).convert("RGB")
            few = taken.quantize(COLOURS, dither=Image.Dither.NONE)
            few.save(folder / f"report-{width}-{scheme}.png", optimize=True)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
