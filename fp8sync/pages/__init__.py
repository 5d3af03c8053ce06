"""Reports as one HTML file that needs nothing else; light and dark, wide and narrow.

`style` names the palette, `figures` draws plain data with matplotlib as SVG, `document` puts a page
together, `verdicts` makes the page of `fp8sync verify` and of a whole matrix. Needs the extra `report`.
"""
