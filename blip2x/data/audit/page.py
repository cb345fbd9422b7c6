"""An audit as one page, which needs nothing but itself."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from blip2x.data.audit.survey import Shown, Survey
from blip2x.data.audit.verdicts import Line
from blip2x.pages import data_uri, render_page

_SIDE = 160  # pixels of a small picture, at most
_QUALITY = 70


def audit_page(survey: Survey, lines: list[Line], facts: dict[str, str]) -> str:
    """HTML that shows `lines`, the figures and the pictures of `survey`, and under the title `facts` about the run."""
    across = survey.figures["across"]
    return render_page(
        Path(__file__).with_name("audit.html.jinja"),
        {"thumbnail": _thumbnail, "tallest": _tallest},
        leaks=[found for found in across if any(found[how]["count"] for how in ("same_path", "same_file", "near"))],
        figures=survey.figures,
        sheets=survey.sheets,
        groups=survey.groups,
        lines=lines,
        facts=facts,
    )


def _thumbnail(shown: Shown) -> str | None:
    """The picture as a data URI; None: it cannot be opened."""
    file = io.BytesIO()
    try:
        picture = shown.picture.open()
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        picture.save(file, "JPEG", quality=_QUALITY)
    except Exception:  # one picture is not worth a page
        return None
    return data_uri(file.getvalue(), "image/jpeg")


def _tallest(bars: list[list[int]]) -> Any:
    return max((bar[2] for bar in bars), default=1)
