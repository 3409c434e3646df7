"""Build the example's text files from four public-domain collections.

    python examples/make_text.py SOURCE_DIR

SOURCE_DIR holds `shakespeare.txt`, `inaugural.txt`, `state_union.txt` and `genesis_kjv.txt`: the files of the NLTK data
packages of those names (of genesis the King James Version), each package as one file, its parts three line ends apart.
The result, `examples/text/{train,valid,test}.txt`, is shipped, so nothing else in the project needs the sources.

A document is a scene of a play, an address, or a piece of Genesis of about 4 kB that ends where a verse does. Every
n-th document of a collection goes to valid.txt, every n-th to test.txt (n per collection: `COLLECTIONS`). Held-out
documents are cut to their first 8 kB, so that they are of comparable size; what is cut off is used nowhere. A line of
more than 80 characters that stands in two of the files is taken out of one (of train rather than valid, of valid
rather than test).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

TEXT = Path(__file__).parent / "text"
SEPARATOR = "\n<|doc|>\n"
HELD_OUT_BYTES = 8_000
SHORTEST = 200
LONG_LINE = 80


def scenes(text: str) -> list[str]:
    """Scenes of the plays, a prologue with the scene after it; titles, licences and lists of persons are left out."""
    found = []
    for play in re.split(r"(?m)^\s*-->\n(?=.*\nText placed in the public domain)", text)[1:]:
        _, _, acts = play.partition("\nACT I\n")
        acts = re.sub(r"(?m)^ACT [IVX]+\n", "", acts)
        found += re.split(r"\n(?=PROLOGUE\n|(?<!PROLOGUE\n)SCENE [IVX]+[.:])", acts)
    merged: list[str] = []
    for scene in found:
        if merged and merged[-1].startswith("PROLOGUE"):
            merged[-1] += "\n" + scene
        else:
            merged.append(scene)
    return merged


def inaugural_addresses(text: str) -> list[str]:
    """Inaugural addresses; a few have headed sections that stand as far apart as the addresses do."""
    heading = r"(?:[A-Z ]+|The American \w+|Liberty and Change|Change and the Union)\n"
    return re.split(rf"\n{{3,}}(?!{heading})", text)


def state_of_the_union(text: str) -> list[str]:
    """State of the Union messages; their title lines and the link lists of web pages are left out."""
    text = re.sub(r"(?s)\n *WEB RESOURCES >>.*?ALL WEB RESOURCES >>", "", text)
    titles = (
        r"PRESIDENT [A-Z.' ]+'S ",
        r"ADDRESS (?:BEFORE A|OF THE PRESIDENT TO THE) JOINT SESSION OF (?:THE )?CONGRESS",
        r"STATE OF THE UNION ADDRESS OF THE PRESIDENT",
        r"Annual Message to the Congress on the State of the Union\. ",
        r"Address on the State of the Union Delivered Before ",
        r"State of the Union Message to the Congress",
    )
    return re.split(rf"(?:^|\n)(?:{'|'.join(titles)}).*\n", text)


def genesis(text: str) -> list[str]:
    """Pieces of about 4 kB. A line that ends in a full stop and is well short of the margin ends a verse."""
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) > 4_000 and line.endswith(".\n") and len(line) < 55:
            pieces.append(piece)
            piece = ""
    return [*pieces, piece]


#: Name of the source ▶ (how to split it, n: one document in n goes to valid.txt and one in n to test.txt).
COLLECTIONS: dict[str, tuple[Callable[[str], list[str]], int]] = {
    "shakespeare": (scenes, 7),
    "inaugural": (inaugural_addresses, 9),
    "state_union": (state_of_the_union, 9),
    "genesis_kjv": (genesis, 7),
}


def clean(text: str) -> str:
    """No blanks at line ends, and at most two empty lines at a time."""
    return re.sub(r"\n{4,}", "\n\n\n", re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n")))


def cut(document: str) -> str:
    """The whole lines (or, within a very long line, sentences) of the first HELD_OUT_BYTES."""
    if len(document.encode()) <= HELD_OUT_BYTES:
        return document
    head = document.encode()[:HELD_OUT_BYTES].decode(errors="ignore")
    end = max(head.rfind("\n"), head.rfind(". ") + 1)
    return head[:end].rstrip()


def long_lines(documents: list[str]) -> set[str]:
    """Lines too long to be alike by chance."""
    return {line for document in documents for line in document.split("\n") if len(line) > LONG_LINE}


def without(document: str, lines: set[str]) -> str:
    """The document without the given lines."""
    return "\n".join(line for line in document.split("\n") if line not in lines).strip()


def build(source: Path) -> dict[str, list[str]]:
    """Documents of the three files."""
    files: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for name, (split, every) in COLLECTIONS.items():
        text = clean((source / f"{name}.txt").read_text(encoding="utf-8"))
        documents = [re.sub(r"\n{3,}", "\n\n", d).strip() for d in split(text)]
        documents = [d for d in documents if len(d) > SHORTEST]
        counts = dict.fromkeys(files, 0)
        for number, document in enumerate(documents):
            place = {2: "valid", every // 2 + 2: "test"}.get(number % every, "train")
            files[place].append(document if place == "train" else cut(document))
            counts[place] += 1
        print(f"{name}: {len(documents)} documents, {counts}")
    protected = long_lines(files["test"])
    for name in ("valid", "train"):
        shared = long_lines(files[name]) & protected
        files[name] = [without(d, shared) for d in files[name]]
        protected |= long_lines(files[name])
        print(f"{name}: {len(shared)} lines taken out that stand in another file")
    return files


def main() -> None:
    """Write train.txt, valid.txt and test.txt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE_DIR")
    files = build(parser.parse_args().source)
    TEXT.mkdir(exist_ok=True)
    for name, documents in files.items():
        text = SEPARATOR.join(documents) + "\n"
        (TEXT / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")
        print(f"{name}.txt: {len(documents)} documents, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()
