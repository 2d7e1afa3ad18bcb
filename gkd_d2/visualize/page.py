"""An HTML page of many pictures."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from gkd_d2.visualize.legend import TOP_ROW

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 1800px; padding: 0 1em }}
h1 {{ font-size: 1.4em }}
dl {{ display: grid; grid-template-columns: max-content minmax(0, 50em); gap: .2em 1.2em }}
dt {{ font-weight: 600 }}
dd {{ margin: 0 }}
figure {{ margin: 2em 0; border-top: 1px solid #ccc; padding-top: 1em }}
img {{ width: 100%; height: auto }}
th, td {{ padding: .1em 1em .1em 0; text-align: left }}
</style>
<h1>{title}</h1>
<dl>
{facts}
</dl>
{table}
<h2>What the pictures show</h2>
<dl>
{legend}
</dl>
{figures}
</html>
"""


def write_page(
    path: Path,
    title: str,
    facts: Mapping[str, str],
    pictures: Mapping[str, str],
    columns: Mapping[str, str],
    table: str = "",
) -> None:
    """Write an HTML page of many pictures, with a legend.

    Args:
        path: of the page.
        title: of the page.
        facts: what the pictures were made of, name -> value.
        pictures: file beside the page -> caption.
        columns: of the maps in them, heading -> what it shows.
        table: HTML to stand above the pictures.
    """
    legend = {
        "top row": TOP_ROW,
        "rows below": "One level each: its name, stride in pixels and size in cells.",
        **columns,
    }
    figures = [
        f'<figure><a href="{quote(name)}"><img src="{quote(name)}" alt="{html.escape(caption)}" loading="lazy"></a>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for name, caption in pictures.items()
    ]
    page = _PAGE.format(
        title=html.escape(title),
        facts=_terms(facts),
        table=table,
        legend=_terms(legend),
        figures="\n".join(figures),
    )
    path.write_text(page, encoding="utf-8")


def _terms(texts: Mapping[str, str]) -> str:
    return "\n".join(f"<dt>{html.escape(term)}<dd>{html.escape(text)}" for term, text in texts.items())
