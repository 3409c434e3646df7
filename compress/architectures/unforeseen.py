"""Errors that a class raises because its inferred record does not describe it well enough, as refusals. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from compress.architectures.model_map import model_map
from compress.errors import CompressError, PassError, is_lack, one_line
from compress.spec.spec import Spec


@contextlib.contextmanager
def refused(spec: Spec, what: str) -> Iterator[None]:
    """Within, any error of a model without a written record becomes a `PassError`; the error itself is its cause.

    Errors of models with a written record are faults of this package, and lacks of memory are the machine's: they pass.
    """
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        if is_lack(error) or model_map(spec).record.source == "written":
            raise
        raise PassError(
            f"{what} meets what the inferred record of {spec.structure.class_name or spec.structure.model_type} does not "
            f"describe ({type(error).__name__}: {one_line(error)})",
            fix="use another method, or write a record: docs/extend/family.md",
        ) from error
