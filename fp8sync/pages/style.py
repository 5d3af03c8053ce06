"""The look of the report: one palette, named in CSS, that plots and text share.

Matplotlib writes fixed colours. Each role therefore has a placeholder colour that no plot uses
otherwise, and `themed` turns placeholders into CSS variables, so that one SVG serves light and dark.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Role:
    """What a colour is for."""

    name: str
    placeholder: str
    light: str
    dark: str


ROLES = (
    Role("ink", "#010101", "#1d2329", "#e6e9ec"),
    Role("muted", "#020202", "#5b656f", "#a3adb7"),
    Role("grid", "#030303", "#dfe3e7", "#333b43"),
    Role("page", "#040404", "#ffffff", "#15191d"),
    Role("stale", "#050505", "#b4500f", "#f39a5c"),
    Role("fresh", "#060606", "#1766ab", "#6fb7f4"),
    Role("bad", "#070707", "#b3261e", "#ff8a80"),
)
COLOR = {role.name: role.placeholder for role in ROLES}

MATPLOTLIB = {
    "svg.fonttype": "none",
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": COLOR["muted"],
    "axes.labelcolor": COLOR["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": COLOR["grid"],
    "text.color": COLOR["ink"],
    "xtick.color": COLOR["muted"],
    "ytick.color": COLOR["muted"],
    "xtick.labelcolor": COLOR["ink"],
    "ytick.labelcolor": COLOR["ink"],
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def themed(svg: str, prefix: str) -> str:
    """Makes matplotlib's SVG fit to stand inside a page, several to a page.

    Args:
        svg: a whole SVG document.
        prefix: goes before every id, which are the same in every figure.

    Returns:
        The svg element alone, with CSS variables for colours.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for role in ROLES:
        svg = svg.replace(role.placeholder, f"var(--{role.name})")
    return svg


def stylesheet() -> str:
    """The page's CSS."""
    light = "".join(f"--{role.name}:{role.light};" for role in ROLES)
    dark = "".join(f"--{role.name}:{role.dark};" for role in ROLES)
    return f"""
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--page);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: 0 0 .75rem; }}
h2 {{ font-size: 1.15rem; margin: 2.5rem 0 .25rem; }}
p {{ margin: .25rem 0 .75rem; max-width: 44rem; }}
.muted, figcaption {{ color: var(--muted); }}
.verdict {{ border-left: .25rem solid var(--fresh); padding-left: .75rem; }}
.verdict.failed {{ border-color: var(--bad); }}
.pair {{ display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }}
figure {{ margin: .5rem 0; min-width: 0; }}
figcaption {{ font-size: .9rem; }}
svg {{ display: block; width: 100%; max-width: 28rem; height: auto; }}
svg text {{ font-family: system-ui, sans-serif !important; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }}
th {{ font-weight: 600; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
.terms td:last-child {{ text-align: left; white-space: normal; }}
pre {{ margin: .25rem 0 1rem; padding: .6rem .75rem; border: 1px solid var(--grid);
  border-radius: .25rem; font: .85rem/1.45 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }}
pre b {{ font-weight: inherit; color: var(--muted); }}
"""
