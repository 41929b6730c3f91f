"""Writes the results of a search as one HTML file that opens from disk, needs no network and runs no script."""

import base64
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from training.eval.report.page import MAX_BYTES, TEMPLATES, make_thumbnails
from training.readers.files import upright
from training.runtime.files import atomic_write
from training.runtime.messages import render_page


def write_page(
    path: Path, query: str | Path, results: Sequence[tuple[Path, float]], folder: Path, facts: dict[str, str]
) -> None:
    """Writes the page.

    Args:
        path: the file.
        query: the text, or the image file.
        results: image files and their scores, best first.
        folder: folder of the images, to which the names shown are relative.
        facts: name -> value, shown below the heading.
    """
    files = [upright(path) for path, _ in results]
    if isinstance(query, Path):
        files.append(upright(query))
    thumbnails = make_thumbnails(files, MAX_BYTES // 2)
    encoded = [base64.b64encode(thumbnail).decode() for thumbnail in thumbnails]
    page = render_page(
        TEMPLATES / "search.html.j2",
        query=str(query),
        query_image=encoded[-1] if isinstance(query, Path) else None,
        facts=facts,
        results=[
            {"name": str(file.relative_to(folder)), "address": file.resolve().as_uri(), "score": f"{score:.4f}"}
            | {"thumbnail": thumbnail}
            for (file, score), thumbnail in zip(results, encoded)
        ],
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
