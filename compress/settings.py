"""Base of settings models, and the amounts that settings are written in.

An amount is a *share* when it is a percentage or a fraction below 1, and a *count* when it is an integer from 1 up.
Sizes take units (``500MB``); N:M sparsity is written ``2:4``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, NamedTuple, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError, to_jsonable_python

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?|)b?\s*$", re.IGNORECASE)
_TOO_MANY = 2**63  # bytes of any file
_LARGEST = 10**308  # an integer up to here has a float
_PERCENT = re.compile(r"^\s*(-?[0-9]+(?:\.[0-9]+)?)\s*%\s*$")


class Settings(BaseModel):
    """Base of every settings model: frozen, with a description for every field; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=False, defer_build=True)


def defaults(model: type[BaseModel], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The default of every setting that has one, as JSON values. Some depend on the settings ``given``."""
    known = dict(given or {})
    values: dict[str, Any] = {}
    dependent = _dependent(model)
    for name, field in model.model_fields.items():
        if not field.is_required():
            factory: Any = field.default_factory
            value = field.get_default() if factory is None else factory(known) if name in dependent else factory()
            values[name] = to_jsonable_python(value)
            known.setdefault(name, value)
    return values


@cache
def _dependent(model: type[BaseModel]) -> frozenset[str]:
    """Settings whose default depends on others; pydantic inspects a signature whenever it is asked."""
    return frozenset(name for name, field in model.model_fields.items() if field.default_factory_takes_validated_data)


class Pattern(NamedTuple):
    """N:M sparsity: ``n`` weights are kept of every ``m`` consecutive ones along the input dimension."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def expected(phrase: str, value: Any) -> PydanticCustomError:
    """The error for a value that is not what a phrase says, such as ``a size such as 500MB``."""
    return PydanticCustomError("amount", "expected {expected}, got {value}", {"expected": phrase, "value": repr(value)})


def distinct(value: tuple[str, ...]) -> tuple[str, ...]:
    """The names unchanged. Raises `ValueError` for a name that is given twice."""
    if twice := [name for i, name in enumerate(value) if name in value[:i]]:
        raise ValueError(f"`{twice[0]}` is named twice")
    return value


def parse_size(value: Any) -> int:
    """Parse ``500MB`` (10^6), ``4GiB`` (2^30) or a plain number of bytes into bytes."""
    size: float = 0
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _SIZE.match(value)):
        size = float(match[1]) * _UNITS[match[2].lower()]
    if not 0 < size < _TOO_MANY:
        raise expected("a size such as 500MB or 4GiB", value)
    return max(1, int(size))


def parse_share(value: Any) -> float:
    """Parse ``50%`` or ``0.5`` into a fraction strictly between 0 and 1."""
    share: float | None = None
    if isinstance(value, str) and (match := _PERCENT.match(value)):
        share = float(match[1]) / 100
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        share = value if 0 < value < 1 else None  # an integer may be too large for a float
    if share is None or not 0 < share < 1:
        raise expected("a share between 0 and 1, such as 50% or 0.5", value)
    return share


def parse_amount(value: Any) -> float | int:
    """Parse a share (``25%``, ``0.25``) into a float, or a count (``2``) into an int."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and value >= 1:
        return int(value)
    if whole or (isinstance(value, float) and value >= 1):
        raise expected("a share such as 25% or 0.25, or a count from 1 up", value)
    return parse_share(value)


def parse_pattern(value: Any) -> Pattern:
    """Parse ``2:4`` into ``Pattern(2, 4)``."""
    if isinstance(value, Pattern):
        return value
    match = re.match(r"^\s*([0-9]+)\s*:\s*([0-9]+)\s*$", value) if isinstance(value, str) else None
    if match is None:
        raise expected("an N:M pattern such as 2:4", value)
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m:
        raise expected("an N:M pattern that keeps N of M weights with 0 < N < M", value)
    return Pattern(n, m)


def parse_increase(value: Any) -> dict[str, Any]:
    """Parse an allowed change: ``5%`` (relative) into ``{"value": 0.05, "relative": True}``; a plain number is absolute."""
    if isinstance(value, dict):
        return value
    if isinstance(value, str) and (match := _PERCENT.match(value)) and math.isfinite(float(match[1])):
        return {"value": float(match[1]) / 100, "relative": True}
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST:
        return {"value": float(value), "relative": False}
    raise expected("a relative change such as 5%, or an absolute one such as 0.02", value)


def parse_ratio(value: Any) -> float:
    """Parse ``0.4`` or ``40%`` into a float above 0."""
    number = _number(value)
    if number is None or number <= 0:
        raise expected("a ratio above 0, such as 0.4 or 40%", value)
    return number


def parse_size_ratio(value: Any) -> float:
    """Parse ``0.4`` or ``40%`` into a float above 0 and up to 2: no pass more than doubles a checkpoint."""
    number = _number(value)
    if number is None or not 0 < number <= 2:
        raise expected("a ratio above 0 and up to 2, such as 0.4 or 40%", value)
    return number


def parse_level(value: Any) -> float:
    """Parse ``0.95`` or ``95%`` into a float from 0 to 1."""
    number = _number(value)
    if number is None or not 0 <= number <= 1:
        raise expected("a share from 0 to 1, such as 0.95 or 95%", value)
    return number


def _number(value: Any) -> float | None:
    if isinstance(value, str) and (match := _PERCENT.match(value)) and float(match[1]) >= 0:
        return float(match[1]) / 100 if math.isfinite(float(match[1])) else None
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST
    return float(value) if known else None  # a larger integer has no float


ByteSize = Annotated[
    int, BeforeValidator(parse_size), WithJsonSchema({"type": ["integer", "string"], "examples": ["500MB", "4GiB"]})
]
Fraction = Annotated[
    float, BeforeValidator(parse_share), WithJsonSchema({"type": ["number", "string"], "examples": ["50%", 0.5]})
]
Amount = Annotated[
    float | int, BeforeValidator(parse_amount), WithJsonSchema({"type": ["number", "string"], "examples": ["25%", 2]})
]
Ratio = Annotated[
    float, BeforeValidator(parse_ratio), WithJsonSchema({"type": ["number", "string"], "examples": [0.4, "40%"]})
]
SizeRatio = Annotated[
    float, BeforeValidator(parse_size_ratio), WithJsonSchema({"type": ["number", "string"], "examples": [0.4, "40%"]})
]
Level = Annotated[
    float, BeforeValidator(parse_level), WithJsonSchema({"type": ["number", "string"], "examples": [0.95, "95%"]})
]
PatternNM = Annotated[Pattern, BeforeValidator(parse_pattern), WithJsonSchema({"type": "string", "examples": ["2:4"]})]


def shares_of(model: type[BaseModel]) -> frozenset[str]:
    """Names of the settings that a share can be given for."""

    def has(parts: Iterable[Any]) -> bool:
        return any(_is_share(part) or has(get_args(part)) for part in parts)

    return frozenset(name for name, field in model.model_fields.items() if has((field.annotation, *field.metadata)))


def _is_share(part: Any) -> bool:
    """Whether the examples of a schema have a percentage, and do not begin with a plain number below 1."""
    schema = part.json_schema if isinstance(part, WithJsonSchema) else None
    examples: list[Any] = (schema or {}).get("examples", [])
    return any(str(one).endswith("%") for one in examples) and not isinstance(examples[0], float)


def percentage(value: Any) -> Any:
    """A share as it is best written, ``50%``; any other value, and a share that a percentage would change, as it is."""
    if not isinstance(value, float):
        return value
    text = f"{100 * value:.10g}%"
    match = _PERCENT.match(text)
    return text if match is not None and float(match[1]) / 100 == value else value


def as_written(value: Any) -> str:
    """A JSON value as a recipe has it in one line: ``{lm_head: int8}``, ``[1, 2]``, words bare."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {as_written(each)}' for key, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_written, value))}]"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class Increase(Settings):
    """An allowed increase of a metric, relative to the original's value or absolute."""

    value: float = Field(description="The bound.")
    relative: bool = Field(description="Whether the bound is a share of the original's value.")


AllowedIncrease = Annotated[
    Increase, BeforeValidator(parse_increase), WithJsonSchema({"type": ["number", "string"], "examples": ["5%", 0.02]})
]
