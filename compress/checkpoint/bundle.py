"""The modelling file of compact checkpoints, and the ``auto_map`` that points to it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from compress.checkpoint import attention, edits, storage
from compress.spec.classes import auto_class

FILE_NAME = "modeling_compress.py"
CLASS_NAME = "CompressModel"
_HERE = Path(__file__).parent
#: Line above the half of a module that the modelling file holds.
MARK = "# ---- {}: copied into the modelling file of compact checkpoints ----\n"
#: Imports of `modeling` that the text of modules replaces: title, line, folder, modules.
_IMPORTS = (
    (
        "reading",
        "from compress.checkpoint.storage.reading import decode, part_names\n",
        _HERE / "storage",
        storage.MODULES,
    ),
    (
        "attention",
        "from compress.checkpoint.attention.interface import register\n",
        _HERE / "attention",
        attention.MODULES,
    ),
    ("editing", "from compress.checkpoint.edits.editing import edited_class\n", _HERE / "edits", edits.MODULES),
)


#: Imports inside functions of what the bundled file has above them.
_LATE = re.compile(r"^ +(?:import torch|from compress\.checkpoint\.\S+ import [^\n]+)\n+", re.MULTILINE)


@cache
def source() -> bytes:
    """Text of the bundled file: `modeling`, and the marked halves of the modules that it needs from this package."""
    text, parts = (_HERE / "modeling.py").read_text(encoding="utf-8"), list[str]()
    for title, line, room, modules in _IMPORTS:
        assert line in text, f"modeling.py must import {title} in one line"
        text = text.replace(line, "" if parts else "@@")
        for module in modules:
            _, mark, body = (room / f"{module}.py").read_text(encoding="utf-8").partition(MARK.format(title))
            assert mark, f"{module}.py must have the line {MARK.format(title)}"
            body = _LATE.sub("", body)
            parts.append(f"# ---- {title}: {module} ----\n\n{body.strip()}\n\n\n")
    head, _, tail = text.partition("@@")
    return f"{head.rstrip()}\n\n\n{''.join(parts)}# ---- loading ----\n\n{tail.lstrip()}".encode()


def auto_map(class_name: str | None) -> dict[str, str]:
    """``auto_map`` of a compact checkpoint whose stock class is ``class_name``."""
    module = FILE_NAME.removesuffix(".py")
    result = {"AutoConfig": f"{module}.CompressConfig", "AutoModel": f"{module}.CompressModel"}
    auto = auto_class(class_name)
    return result | {auto: f"{module}.{auto.replace('AutoModel', 'Compress')}"} if auto != "AutoModel" else result
