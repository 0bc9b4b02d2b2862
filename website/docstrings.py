"""What griffe, which reads docstrings for the API page, has to be told of those of normkit."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """Lets "Example:" be what griffe knows as "Examples:", or prompts would be quotations."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Be called for everything that has a name."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
