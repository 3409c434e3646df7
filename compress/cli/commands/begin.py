"""The command `init`, and recipes of presets."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.cli.commands.common import Code, load, say

if TYPE_CHECKING:
    from compress.recipe import Recipe

#: The file that `init` writes.
RECIPE = Path("recipe.yaml")


def init(
    model: str, *, goal: str, preset: str | None, max_bytes: str | None, output: Path | None, code: Code, offline: bool
) -> None:
    """``compress init``. A recipe at ``output`` is not replaced; ``-`` is stdout."""
    from pydantic_core import PydanticCustomError

    from compress.errors import CompressError, OutputError
    from compress.files import write_atomically
    from compress.formatting import format_bytes
    from compress.presets.begin import first_recipe, named_output
    from compress.presets.render import rendered
    from compress.settings import parse_size

    file = output or RECIPE
    if str(file) != "-" and file.exists():
        raise OutputError("is there already", where=str(file), fix="name another file with -o")
    try:
        most = None if max_bytes is None else parse_size(max_bytes)
    except PydanticCustomError as error:
        raise CompressError(str(error), where="--max-bytes") from None
    result = named_output(model, preset or goal)
    fitted = first_recipe(model, goal, preset, most, result, offline=offline, allow_links=code.links, **code.options())
    text = rendered(fitted, shlex.join(["compress", *sys.argv[1:]]), file.parent)
    if str(file) == "-":
        sys.stdout.write(text)
        return
    write_atomically(file, text.encode())
    before, after = fitted.plan.original.bytes, fitted.plan.stages[-1].size.bytes
    say(f"{file}: {format_bytes(before)} ▶ {format_bytes(after)} planned, {'; '.join(fitted.draft.notes)}")
    say(f"next: compress run {shlex.quote(str(file))}")


def load_or_make(path: Path, sets: Sequence[str], preset: str | None, output: Path | None, offline: bool) -> Recipe:
    """The recipe in a file; with ``preset`` that of a model. ``output`` and ``offline`` are set in it."""
    sets = [*sets, *([f"output={output}"] if output else []), *(["offline=true"] if offline else [])]
    if preset is None:
        return load(path, sets)
    from compress.presets.begin import first_recipe, named_output
    from compress.presets.drafts import GOALS
    from compress.recipe import recipe_from_mapping

    model = str(path)
    result = named_output(model, preset)
    options = {key: True for key in ("trust_remote_code", "ignore_auto_map", "allow_links") if f"{key}=true" in sets}
    fitted = first_recipe(model, GOALS[0], preset, None, result, offline=offline, **options)
    return recipe_from_mapping(fitted.mapping, sets)
