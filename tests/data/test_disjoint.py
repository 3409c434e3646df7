"""Documents that evaluation shares with other data are found, whole and in part."""

import random

import pytest

from compress.data.disjoint import check_disjoint
from compress.data.documents import Document, read_documents
from compress.errors import DataError


def words(count, seed):
    generator = random.Random(seed)
    return [f"w{generator.randrange(5000)}" for _ in range(count)]


def test_check_disjoint_finds_whole_and_partial_copies():
    seen = [Document("t#0", " ".join(words(3000, 1))), Document("t#1", "a short one")]
    fresh = Document("v#0", " ".join(words(2000, 2)))
    check_disjoint([fresh], seen, "training")
    for shared in (
        "A  short\nONE",
        seen[0].text,
        " ".join(seen[0].text.split()[100:400]),  # a piece
        " ".join([*words(5000, 3), *seen[0].text.split()[:1500]]),  # within something long and new
    ):
        with pytest.raises(
            DataError, match=r"data.evaluation shares 1 of its 2 documents with data.training: v#1; evaluate on"
        ):
            check_disjoint([fresh, Document("v#1", shared)], seen, "training")


def test_check_disjoint_accepts_a_quotation():
    seen = [Document("t#0", " ".join(words(3000, 1)))]
    quoting = words(600, 2)
    quoting[100:140] = seen[0].text.split()[50:90]
    check_disjoint([Document("v#0", " ".join(quoting))], seen, "calibration")


def test_example_data_are_disjoint():
    from tests.conftest import ROOT

    sets = {n: read_documents([str(ROOT / f"examples/text/{n}.txt")], "<|doc|>") for n in ("train", "valid", "test")}
    check_disjoint([*sets["valid"], *sets["test"]], sets["train"], "training")
    check_disjoint(sets["test"], sets["valid"], "calibration")
