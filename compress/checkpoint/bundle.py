"""The modelling file of compact checkpoints, and the ``auto_map`` that points to it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from compress.spec.classes import auto_class

FILE_NAME = "modeling_compress.py"
CLASS_NAME = "CompressModel"
_HERE = Path(__file__).parent
#: Modules whose text replaces their import in the bundled copy of `modeling`.
_IMPORTS = {
    "decode": ("storage chains", "from compress.checkpoint.decode import decode, part_names\n"),
    "edits": ("changes of structure", "from compress.checkpoint.edits import edited_class\n"),
}


@cache
def source() -> bytes:
    """Text of the bundled file: `modeling` and the modules that it imports from this package."""
    text, parts = (_HERE / "modeling.py").read_text(encoding="utf-8"), list[str]()
    for module, (title, line) in _IMPORTS.items():
        assert line in text, f"modeling.py must import {module} in one line"
        text = text.replace(line, "" if parts else "@@")
        body = (_HERE / f"{module}.py").read_text(encoding="utf-8").partition("import torch\n")[2].strip("\n")
        parts.append(f"# ---- {title} ----\n\n{body}\n\n\n")
    head, _, tail = text.partition("@@")
    return f"{head.rstrip()}\n\n\n{''.join(parts)}# ---- loading ----\n\n{tail.lstrip()}".encode()


def auto_map(class_name: str | None) -> dict[str, str]:
    """``auto_map`` of a compact checkpoint whose stock class is ``class_name``."""
    module = FILE_NAME.removesuffix(".py")
    result = {"AutoConfig": f"{module}.CompressConfig", "AutoModel": f"{module}.CompressModel"}
    auto = auto_class(class_name)
    return result | {auto: f"{module}.{auto.replace('AutoModel', 'Compress')}"} if auto != "AutoModel" else result
