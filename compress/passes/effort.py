"""Efforts: defaults of a pass for the time that one is ready to spend.

A settings class has one table of these defaults. The setting ``effort`` chooses its column, and a key that a recipe gives wins.
So an effort sets nothing that a recipe cannot, and settings hold the resolved values from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, Field, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from compress.settings import as_written

Effort: TypeAlias = Literal["fast", "balanced", "best"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)
#: The effort of a recipe that names none.
USUAL: Effort = "balanced"


class EffortDefaults:
    """Defaults by effort. The settings class has it as ``efforts``; every effort sets the same keys.

    Args:
        fast, balanced, best: key ▶ default.
    """

    def __init__(self, *, fast: Mapping[str, Any], balanced: Mapping[str, Any], best: Mapping[str, Any]) -> None:
        self.table: dict[Effort, Mapping[str, Any]] = {"fast": fast, "balanced": balanced, "best": best}

    @property
    def keys(self) -> list[str]:
        """The keys that an effort sets."""
        return list(self.table[USUAL])

    def setting(self) -> Any:
        """The field ``effort``. It comes before the keys that depend on it."""
        chosen = "; ".join(f"`{effort}`: {self.shown(effort)}" for effort in EFFORTS)
        return Field(
            default=USUAL,
            description=f"Chooses the defaults of other settings; those that are given win. {chosen}. Without effect on "
            "methods that read no data.",
        )

    def of(self, key: str) -> Callable[[dict[str, Any]], Any]:
        """The default of a field, by the effort among the fields before it: a ``default_factory``."""
        return lambda fields: deepcopy(self.table[fields["effort"]][key])

    def shown(self, effort: Effort, leave: frozenset[str] | set[str] = frozenset()) -> str:
        """Return what an effort sets, as in a recipe, without the keys to ``leave``."""
        values = {k: to_jsonable_python(v) for k, v in self.table[effort].items() if k not in leave}
        return ", ".join(f"`{k}: {as_written(v)}`" for k, v in values.items())

    def check(self, model: type[BaseModel]) -> None:
        """Check the table against its settings class, when that is imported.

        Raises:
            TypeError: an effort sets other keys than another, a key is no field with its default from here, or a value is
                not one that the field holds.
        """
        fields = list(model.model_fields)
        for effort, values in self.table.items():
            if set(values) != set(self.keys):
                raise TypeError(f"{model.__name__}: effort {effort} does not set {', '.join(self.keys)}")
            for key, value in values.items():
                field = model.model_fields.get(key)
                if field is None or fields.index(key) < fields.index("effort"):
                    raise TypeError(f"{model.__name__}: effort sets `{key}`, which is no field after `effort`")
                if _default(field, {"effort": effort}) != value:
                    raise TypeError(f"{model.__name__}: `{key}` does not take its default from the effort")
                kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
                if TypeAdapter(kind).validate_python(value) != value:
                    raise TypeError(f"{model.__name__}: effort {effort} sets `{key}` to what it is not read as")


def _default(field: FieldInfo, fields: dict[str, Any]) -> Any:
    """The default of a field after those ``fields``; None without one."""
    return None if field.is_required() else field.get_default(call_default_factory=True, validated_data=fields)
