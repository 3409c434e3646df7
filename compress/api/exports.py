"""The function `export`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.api.guarded import guarded
from compress.errors import CompressError
from compress.files import place
from compress.progress import Progress
from compress.progress.display import chosen


@guarded
def export(
    model: str | Path,
    output: str | Path,
    *,
    to: str,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    allow_links: bool = False,
    offline: bool = False,
    progress: Progress | bool | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Write a checkpoint as a file of another runtime to ``output``, which must not exist.

    Args:
        to: the target, such as ``gguf``. dry_run: plan and write nothing.
        settings: of the target; docs/export.md lists them.

    Returns:
        A dictionary, schema ``compress.export/1``: ``bytes``, and ``tensors`` by storage (``source``, ``type``, ``tensors``,
        ``bytes``, ``exact``).

    Raises:
        CompressError: the target cannot hold the checkpoint, a package is missing, or ``output`` exists.
    """
    from compress.checkpoint.open import open_checkpoint
    from compress.checkpoint.sidecars import with_links
    from compress.exports import TARGETS, get, planned
    from compress.exports import export as write
    from compress.exports.export import check_path

    if to not in TARGETS:
        close = difflib.get_close_matches(to.lower(), TARGETS, n=1, cutoff=0.5)
        fix = f"did you mean `{close[0]}`?" if close else f"targets: {', '.join(TARGETS)}"
        raise CompressError(f"there is no target `{to}`", fix=fix)
    output = place(output)
    model_settings = _settings(to, get(to).settings, settings)
    if not dry_run:
        check_path(output)
    checkpoint = open_checkpoint(
        with_links(model, allow_links),
        trust_remote_code=trust_remote_code,
        ignore_auto_map=ignore_auto_map,
        offline=offline,
    )
    if dry_run:
        return planned(checkpoint, to, model_settings).to_json()
    with chosen(progress) as shown:
        return write(checkpoint, to, output, model_settings, shown).to_json()


def _settings(to: str, model: Any, given: dict[str, Any]) -> Any:
    """Settings of a target. Raises `CompressError` for one that it has not, or a value that it does not take."""
    if unknown := sorted(given.keys() - model.model_fields.keys()):
        known = ", ".join(model.model_fields) or "none"
        raise CompressError(f"{to} has no setting `{unknown[0]}`", fix=f"its settings: {known}")
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise CompressError(f"`{'.'.join(map(str, first['loc']))}`: {first['msg'].lower()}") from None
