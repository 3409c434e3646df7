"""The card of a run's output: what is known about its base model and its loading, and the recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.running import codes, narrow_codes
from compress.checkpoint.sidecars import safe_file
from compress.checkpoint.store import needs_code
from compress.files import expanded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compress.pipeline.state import Run

#: A folder of huggingface_hub's cache ends so.
_SNAPSHOT = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]+)$")
#: An owner and a name, as the hub allows them.
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)


def base_name(model: str) -> str:
    """A hub id as it is; the last name of a local folder."""
    path = expanded(model)
    return path.resolve().name if path.exists() else model


def card_of(state: Run, report: Mapping[str, Any], picture: str | None, *, original: bool) -> str:
    """README.md of the result.

    Args:
        picture: file name of the main picture beside it. original: carry over the base model's own README.md.
    """
    from compress import report as reports
    from compress.recipe import to_yaml

    folder = state.original.folder
    assert folder is not None
    spec = open_checkpoint(report["stages"][-1]["folder"], trust_remote_code=True).spec
    recipe = reports.brief(report["recipe"]["resolved"])
    recipe.pop("log", None)  # it concerns nobody else
    recipe |= {"model": base_name(state.recipe.model), "output": state.output.name}
    recipe["data"] = {
        key: {**section, **{k: _last_names(section[k]) for k in ("files", "images") if k in section}}
        for key, section in recipe.get("data", {}).items()
    }
    return reports.model_card(
        report,
        _readme(folder) if original else None,
        base=_base(state.recipe.model, folder, state.original.spec.structure.config),
        loading=reports.Loading(
            class_name=spec.structure.class_name,
            compact=needs_code(spec),
            packages=("compressed-tensors>=0.15",) if codes(spec) else (),
            dtype_auto=bool(narrow_codes(spec)),
            quantized=any(t.quant_format is not None for t in spec.stored()),
            sentences=safe_file(folder, "modules.json").is_file(),
            runtime=spec.structure.runtime,
        ),
        recipe_yaml=to_yaml({key: value for key, value in recipe.items() if value != {}}),
        picture=picture,
    )


def _base(model: str, folder: Path, config: Mapping[str, Any]) -> Any:
    """The base model: a hub id where the recipe or the hub's cache tells one, else the folder and the id in its config."""
    from compress.report import Base

    path = expanded(model)
    if not path.exists():
        name, _, revision = model.partition("@")
        return Base(name, _HUB_ID.fullmatch(name) is not None, revision)
    if match := _SNAPSHOT.search(path.resolve().as_posix()):
        return Base(f"{match[1]}/{match[2]}", True, match[3])
    known = config.get("_name_or_path")
    ancestor = known if isinstance(known, str) and _HUB_ID.fullmatch(known) and not Path(known).exists() else None
    return Base(base_name(model), False, ancestor=ancestor)


def _last_names(paths: Any) -> Any:
    """A path or paths; absolute ones are cut to their last names."""
    if isinstance(paths, str):
        return Path(paths).name if Path(paths).is_absolute() else paths
    return [_last_names(path) for path in paths]


def _readme(folder: Path) -> str | None:
    path = safe_file(folder, "README.md")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
