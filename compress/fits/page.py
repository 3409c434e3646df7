"""A search within a bound as one page of HTML: what families cost, what each paid, the finalists, the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.fits.figures import FINALISTS, PAID, TRIALS, finalist_rows, heading, paid_rows, trial_rows
from compress.fits.picture import costs_picture
from compress.report.html.page import Cells, figure_of, style, template


def render_fit(document: Mapping[str, Any], recipe: str) -> str:
    """Return the page of a search. ``recipe``: text of the best combination's."""
    from compress import __version__

    picture = costs_picture(document)
    return template("fit.html").render(
        version=__version__,
        title=f"{document['model']} ▶ {heading(document)}",
        verdict=document["text"],
        pictures=[] if picture is None else [figure_of(picture)],
        paid=Cells(PAID, paid_rows(document), right=(2, 3)),
        finalists=Cells(FINALISTS, finalist_rows(document), right=(0, 2, 3, 4)),
        trials=Cells(TRIALS, trial_rows(document), right=(2, 3)),
        left_out=document["left_out"],
        recipe=recipe,
        style=style(charts=False),
    )
