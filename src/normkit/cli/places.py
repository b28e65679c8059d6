"""Where a command may write a page."""

from pathlib import Path

from ..errors import ArgumentError
from ..files import check_place

__all__ = ["check_page"]


def check_page(html: Path) -> None:
    """Refuse a place that takes no page, before the work, and a file there that is none.

    Raises:
        ArgumentError: the folder takes no file, or a file of another kind is there.
    """
    check_place(html, force=True, said="--html")
    if html.exists() and html.suffix not in (".html", ".htm"):
        raise ArgumentError(
            f"--html {html} is there already and is no page by its name; give a name that ends in .html"
        )
