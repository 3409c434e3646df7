"""Base of the parts of reports, and their numbers."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _number(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


#: A JSON number, or one of three words, as JSON has no number for NaN and infinities.
Number = Annotated[
    float,
    BeforeValidator(_number),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": sorted(_NOT_FINITE)}]}),
]


#: A count; bounded, as a report may be written by hand.
Count = Annotated[int, Field(ge=0, le=2**53)]


class Part(BaseModel):
    """A part of a document. Unknown keys are kept."""

    model_config = ConfigDict(extra="allow")
