"""Errors that a class raises because its inferred record does not describe it well enough, as refusals. Imports no torch."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator

from compress.architectures.model_map import model_map
from compress.errors import CompressError, PassError, is_lack, one_line
from compress.spec.spec import Spec


@contextlib.contextmanager
def refused(spec: Spec, what: str, *, of_class: bool = False) -> Iterator[None]:
    """Within, any error of a model without a written record becomes a `PassError`; the error itself is its cause.

    Errors of models with a written record are faults of this package, and lacks of memory are the machine's: they pass.

    Args:
        of_class: what transformers' own file of the class raises, as where its config lacks a field, is refused in any case.
    """
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        if is_lack(error):
            raise
        name = spec.structure.class_name or spec.structure.model_type
        if of_class and re.search(r"transformers.models.\w+.modeling_", _origin(error)):
            raise PassError(
                f"{what} fails in {name} itself ({type(error).__name__}: {one_line(error)})",
                fix="complete config.json, or use another class",
            ) from error
        if model_map(spec).record.source == "written":
            raise
        raise PassError(
            f"{what} meets what the inferred record of {name} does not describe ({type(error).__name__}: {one_line(error)})",
            fix="use another method, or write a record: docs/extend/family.md",
        ) from error


def _origin(error: BaseException) -> str:
    """The file that raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [frame.filename for frame in frames if "modeling_" in frame.filename]
    return files[-1] if files else ""
