"""Links that lead to other files of the repository than the pages.

A hook of mkdocs: links out of docs/ lead into the repository where mkdocs.yml has an address of it,
and are plain text where it has none.  And a command, for a README.md that leaves the repository, as
that of a package does:

    python website/links.py README.md https://host/owner/normkit v0.1.0
"""

from __future__ import annotations

import argparse
import posixpath
import re
from pathlib import Path
from typing import Any

# An image or a link whose target is a path.
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def absolute(markdown: str, folder: str, repository: str, ref: str, outside: str = "") -> str:
    """Let links lead into the repository; without an address of it, be their text alone.

    Args:
        markdown: of a file in folder, which is relative to the repository.
        folder: "" for the repository's own.
        repository: "https://host/owner/name", or "".
        ref: a tag, a branch or a commit.
        outside: of which folder links are left as they are, "" for none.
    """

    def replaced(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups(default="")
        path = posixpath.normpath(posixpath.join(folder, target))
        if outside and path.startswith(outside + "/"):
            return link[0]
        if not repository:
            return text
        # What is behind "blob" is a page about a file; an image has to be the file.
        kind = "raw" if image else "blob"
        return f"{image}[{text}]({repository.rstrip('/')}/{kind}/{ref}/{path}{anchor})"

    return LINK.sub(replaced, markdown)


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Be called by mkdocs for each page."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")
    return absolute(markdown, folder, config.repo_url or "", "HEAD", outside="docs")


def main() -> None:
    """Rewrite a file of the repository's own folder."""
    parser = argparse.ArgumentParser(description=absolute.__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("repository", help="https://host/owner/name")
    parser.add_argument("ref", help="a tag, a branch or a commit")
    args = parser.parse_args()
    text = absolute(args.file.read_text(), "", args.repository, args.ref)
    args.file.write_text(text)


if __name__ == "__main__":
    main()
