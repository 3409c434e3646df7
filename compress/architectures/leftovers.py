"""Tensors that files hold beside the model."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Leftover:
    """Tensors that the files of a family may hold although some class does not read them.

    Attributes:
        pattern: regular expression for the end of such a name. It matches at the start of the name or after a dot.
        lacking: suffixes of the classes without these tensors; by default every class.
    """

    pattern: str
    lacking: tuple[str, ...] = ("",)

    def fits(self, name: str, class_name: str) -> bool:
        """Whether the tensor is a leftover for a class of that name."""
        return class_name.endswith(self.lacking) and re.search(rf"(?:^|\.)(?:{self.pattern})", name) is not None
