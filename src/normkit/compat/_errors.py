"""Errors of normkit with the names that arguments have in another interface."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NoReturn


def raise_renamed(error: Exception, names: Mapping[str, str]) -> NoReturn:
    """Raise an error again that begins with, or speaks of, an argument by normkit's name."""
    pattern = rf"\b({'|'.join(names)})(?=:|'s|\[)"
    text = re.sub(pattern, lambda found: names[found[0]], str(error))
    raise (error if text == str(error) else type(error)(text)) from None
