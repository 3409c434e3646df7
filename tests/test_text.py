from __future__ import annotations

import codecs
import random

import pytest

from compress.errors import DataError
from compress.text import Document, check_disjoint, fingerprint, read_documents


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def test_documents_of_text_and_json_lines(tmp_path):
    a = write(
        tmp_path / "a.txt",
        codecs.BOM_UTF8 + "one\r\n<|doc|>\r\ntwo é\n <|doc|> \n\n<|doc|>\nthree <|doc|> goes on".encode(),
    )
    b = write(tmp_path / "b.jsonl", '{"text": "four\\nlines"}\n\n{"text": "five", "id": 3}\n')
    documents = read_documents([a, b], "<|doc|>")
    assert documents == [
        Document("a.txt#0", "one"),
        Document("a.txt#1", "two é"),
        Document("a.txt#2", "three <|doc|> goes on"),
        Document("b.jsonl#0", "four\nlines"),
        Document("b.jsonl#1", "five"),
    ]
    assert [d.text for d in read_documents([a])] == ["one\n<|doc|>\ntwo é\n <|doc|> \n\n<|doc|>\nthree <|doc|> goes on"]


def test_files_of_one_name_have_documents_of_their_own(tmp_path):
    (tmp_path / "x").mkdir()
    files = [write(tmp_path / "a.txt", "1"), write(tmp_path / "x/a.txt", "2")]
    assert [d.id for d in read_documents(files)] == ["a.txt#0", "a.txt#1"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "a.txt: is empty"),
        ("a.txt", b" \n\n ", "a.txt: holds no text"),
        ("a.txt", b"abc\0def", "a.txt: is binary, not text"),
        ("a.txt", b"good\nbad \xff", "a.txt:2: is not UTF-8; convert it"),
        ("a.bin", b"text", "a.bin: is no .txt or .jsonl file (`.bin`)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}', 'a.jsonl:2: expected {"text": "…"}'),
        ("a.jsonl", b'{"text": "a"}\n\n{"text":', "a.jsonl:3: is not JSON"),
        ("a.jsonl", b"[1]", "a.jsonl:1: expected"),
    ],
)
def test_bad_files(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(DataError) as caught:
        read_documents([path])
    assert message in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match=r"gone.txt: there is no such file"):
        read_documents([str(tmp_path / "gone.txt")])
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match=r"folder.txt: cannot be read: Is a directory"):
        read_documents([str(tmp_path / "folder.txt")])
    with pytest.raises(DataError, match=r"gone.txt: cannot be read"):
        fingerprint([str(tmp_path / "gone.txt")])


def test_fingerprint_is_of_contents_and_their_order(tmp_path):
    a, b, c = (write(tmp_path / n, t) for n, t in (("a.txt", "x"), ("b.txt", "y"), ("c.txt", "x")))
    assert fingerprint([a, b]) == fingerprint([c, b])
    assert fingerprint([a, b]) != fingerprint([b, a])
    assert fingerprint([a, b]) != fingerprint([a])


def words(count, seed):
    generator = random.Random(seed)
    return [f"w{generator.randrange(5000)}" for _ in range(count)]


def test_shared_text_is_found_whole_and_in_part():
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


def test_a_quotation_is_not_sharing():
    seen = [Document("t#0", " ".join(words(3000, 1)))]
    quoting = words(600, 2)
    quoting[100:140] = seen[0].text.split()[50:90]
    check_disjoint([Document("v#0", " ".join(quoting))], seen, "calibration")


def test_the_example_text_shares_nothing():
    from tests.conftest import ROOT

    sets = {n: read_documents([str(ROOT / f"examples/text/{n}.txt")], "<|doc|>") for n in ("train", "valid", "test")}
    check_disjoint(sets["valid"], sets["train"], "training")
    check_disjoint(sets["test"], sets["train"], "training")
    check_disjoint(sets["test"], sets["valid"], "calibration")
