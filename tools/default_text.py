"""Write the text that the package ships, `compress/data/text/*.jsonl`: excerpts of the text of the examples.

Calibration gets excerpts of training documents, evaluation of validation documents. Addresses are the nearest to modern prose:
all of them are taken, and of plays and Genesis one in some.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from compress.data.default_text import FILES

SOURCE = Path(__file__).resolve().parents[1] / "examples" / "text"
SEPARATOR = "\n<|doc|>\n"
#: Data set ▶ its source, most characters of an excerpt, and one in how many of plays and Genesis.
EXCERPTS = {"calibration": ("train.txt", 1_800, 5), "evaluation": ("valid.txt", 1_500, 1)}


def texts() -> dict[Path, str]:
    """Return the text of each file by its path."""
    result = {}
    for name, (source, most, every) in EXCERPTS.items():
        documents = (SOURCE / source).read_text(encoding="utf-8").split(SEPARATOR)
        kept = [d for i, d in enumerate(documents) if is_address(d) or i % every == 0]
        result[FILES[name]] = "".join(json.dumps({"text": cut(d, most)}, ensure_ascii=False) + "\n" for d in kept)
    return result


def is_address(document: str) -> bool:
    """Whether a document is an address of a president."""
    return re.search(r"America|[Cc]itizens|Government", document) is not None


def cut(document: str, most: int) -> str:
    """The sentences or lines within the first ``most`` characters."""
    if len(document) <= most:
        return document
    ends = [match.end() for match in re.finditer(r"[.?!](?=\s)|\n", document[: most + 1])]
    return document[: ends[-1]].rstrip()


if __name__ == "__main__":
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")
