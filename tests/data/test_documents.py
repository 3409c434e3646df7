"""Text files ▶ documents: every kind, packing and fault."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from compress.data.disjoint import check_disjoint
from compress.data.documents import Document, fingerprint, read_documents
from compress.errors import DataError


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def test_read_documents_reads_text_and_json_lines(tmp_path):
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


def test_documents_of_files_with_one_name_have_distinct_ids(tmp_path):
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
        ("a.bin", b"text", "a.bin: is no .txt, .jsonl, .json, .csv, .tsv or .parquet file (`.bin`)"),
        ("a.npy", b"ids", "a.npy: holds token ids, which only calibration takes"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}', "a.jsonl:2: `text` is 3, not text or a list of messages"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b", "n": 1}',
            "a.jsonl:2: has no field `text`; set `field` to one of: body, n",
        ),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: `text` holds half a surrogate pair"),
        ("a.jsonl", b'{"text": ["a", "b"]}', "a.jsonl:1: `text` is a list, but not of messages"),
        (
            "a.jsonl",
            b'{"text": [{"role": "user"}]}',
            "a.jsonl:1: `text`: message 1 has no content; null stands for it beside",
        ),
        ("a.jsonl", b'{"text": [{"from": "human"}]}', "a.jsonl:1: `text`: message 1 has no content"),
        (
            "a.jsonl",
            b'{"text": [{"role": "user", "content": 3}]}',
            "a.jsonl:1: `text`: message 1 has the content 3, not text",
        ),
        (
            "a.jsonl",
            b'{"text": [{"from": "human", "value": "a"}, {"from": "cat", "value": "b"}]}',
            'a.jsonl:1: `text`: message 2 is from "cat", which is not a role; known are: human, user, gpt',
        ),
        (
            "a.jsonl",
            b'{"text": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
            'a.jsonl:1: `text`: message 1 has a part of the type "image_url": text alone is read; leave such rows out',
        ),
        (
            "a.jsonl",
            b'{"text": [{"role": "user", "content": [3]}]}',
            "a.jsonl:1: `text`: message 1 has a part without text",
        ),
        ("a.json", b'[{"text": "a"},\n {"body": "b"}]', "a.json:2: has no field `text`; set `field` to one of: body"),
        ("a.jsonl", b'[{"text": "a"},\n\n {"text": 3}]', "a.jsonl:3: `text` is 3, not text"),
        ("a.jsonl", b'[{"text": "a"},\n {"text": "b"', "a.jsonl:2: is not JSON: Expecting ',' delimiter"),
        ("a.json", b'[{"text": "a"}\n {"text": "b"}]', "a.json:2: is not JSON: the array goes on without `,` or `]`"),
        ("a.json", b'[{"text": "a"}]\n[', "a.json:1: is not JSON: text follows the array"),
        ("a.json", b'[{"text": "a"}, 3]', "a.json:1: expected {"),
        ("a.json", b"[]", "a.json: holds no text"),
        ("a.json", b'{\n "text": "a"\n}', "a.json:1: is not JSON: Expecting property name enclosed in double quotes"),
        ("a.jsonl", b'{"text": []}\n{"text": null}\n{"text": " "}', "a.jsonl: holds no text"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": [{"role": "user", "content": "hi"}]}',
            "a.jsonl:2: `text` is a chat, and text in rows before; keep texts and chats in files of their own",
        ),
        (
            "a.jsonl",
            b'{"text": [{"role": "user", "content": "hi"}]}\n{"text": "a"}',
            "a.jsonl:2: `text` is text, and a chat in rows before",
        ),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "a.jsonl:1: is not JSON"),
        ("a.csv", b"", "a.csv: is empty"),
        ("a.csv", b"id,text\n", "a.csv: holds no text"),
        ("a.csv", b"id,body\n1,a\n", "a.csv:1: has no field `text`; set `field` to one of: id, body"),
        ("a.csv", b"\nid,text\n", "a.csv:1: has no field `text`"),
        ("a.csv", b"text,text\n1,a\n", "a.csv: has 2 fields `text`; rename one"),
        ("a.csv", b"id,text\n1,a\n2\n", "a.csv:3: has 1 field, the first row names 2"),
        ("a.csv", b'id,text\n1,"a\n2,b\n', "a.csv:3: is not a csv: unexpected end of data"),
        ("a.tsv", b'text\n"a" b\n', "a.tsv:2: is not a tsv:"),
        ("a.parquet", b"PAR1", "a.parquet: is damaged:"),
        ("a.parquet", b"", "a.parquet: is empty"),
        ("a.txt.gz", b"", "a.txt.gz: is empty"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "a.txt.gz: is empty"),
        ("a.txt.gz", b"not packed", "a.txt.gz: is damaged: Not a gzipped file (b'no'); `gzip -t` tests such files"),
        (
            "a.txt.gz",
            gzip.compress(b"some text" * 99, mtime=0)[:-9],
            "a.txt.gz: is damaged: Compressed file ended before",
        ),
        ("a.txt.gz", gzip.compress(b"some text", mtime=0)[:10] + b"\xff" * 20, "a.txt.gz: is damaged: Error -3"),
        ("a.txt.zst", b"not packed", "a.txt.zst: is damaged:"),
        ("a.txt.zst", zstandard.compress(b"some text" * 99)[:-3], "a.txt.zst: is damaged: the file ends too early"),
        ("a.txt.zst", zstandard.compress(b"some text") + b"rest", "a.txt.zst: is damaged:"),
        ("a.bin.gz", b"x", "a.bin.gz: is no .txt, .jsonl, .json, .csv, .tsv or .parquet file (`.gz`)"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n[]', mtime=0), "a.jsonl.gz:2: expected"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text":', "a.jsonl:3: is not JSON"),
        ("a.jsonl", b"[1]", "a.jsonl:1: expected"),
    ],
)
def test_read_documents_names_what_is_wrong_with_a_file(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(DataError) as caught:
        read_documents([path])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


ROWS = [{"n": 1, "body": 'one, "quoted"\nand\ttwo é'}, {"n": 2, "body": " "}, {"n": 3, "body": "x" * 200_000}]


def table(rows, delimiter):
    import io

    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, ["n", "body"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def parquet(rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.parquet"])
def test_read_documents_reads_the_same_from_every_kind(tmp_path, name, packing):
    data = {
        "a.jsonl": "\n".join(json.dumps(row) for row in ROWS).encode(),
        "a.csv": table(ROWS, ","),
        "a.tsv": codecs.BOM_UTF8 + table(ROWS, "\t"),
        "a.parquet": parquet(ROWS),
    }[name]
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packing]
    path = write(tmp_path / f"{name}{packing}", pack(data))
    before = csv.field_size_limit()
    assert read_documents([path], "never", "body") == [
        Document(f"{name}{packing}#0", ROWS[0]["body"]),
        Document(f"{name}{packing}#1", ROWS[2]["body"]),
    ]
    assert csv.field_size_limit() == before
    with pytest.raises(DataError, match=r"has no field `text`; set `field` to one of: n, body"):
        read_documents([path])


def test_read_documents_reads_several_zstandard_frames(tmp_path):
    one, two = b"one\n<|doc|>\n", b"two"
    paths = [
        write(tmp_path / "a.txt.zst", zstandard.compress(one) + zstandard.compress(two)),
        write(tmp_path / "A.TXT.GZ", gzip.compress(one, mtime=0) + gzip.compress(two, mtime=0)),
    ]
    assert [d.text for d in read_documents(paths, "<|doc|>")] == ["one", "two"] * 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_read_documents_reads_chats(tmp_path, name):
    chats = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "name": "bot"}],
        [{"role": "user", "content": "bye"}],
    ]
    rows = [{"messages": chat} for chat in chats]
    data = parquet(rows) if name == "a.parquet" else "\n".join(map(json.dumps, rows)).encode()
    documents = read_documents([write(tmp_path / name, data)], field="messages")
    assert documents == [
        Document(f"{name}#0", "hi\nhello", tuple(chats[0])),
        Document(f"{name}#1", "bye", tuple(chats[1])),
    ]
    with pytest.raises(DataError, match=r"shares 1 of its 1 documents"):
        check_disjoint([documents[1]], [Document("t#0", "Bye")], "training")


def test_read_documents_reads_chats_of_other_forms(tmp_path):
    """ShareGPT, parts, and calls of tools without content: all become what templates read."""
    calls = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    rows = [
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello", "weight": 1}],
        [{"role": "user", "content": [{"type": "text", "text": "one "}, "two ", {"text": "three", "image": None}]}],
        [{"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "sun", "name": None}],
    ]
    expected = [
        ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "weight": 1}),
        ({"role": "user", "content": "one two three"},),
        ({"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "sun"}),
    ]
    for name in ("a.jsonl", "a.json"):
        lines = [json.dumps({"chat": row}) for row in rows]
        text = "\n".join(lines) if name == "a.jsonl" else "[\n" + ",\n".join(lines) + "\n]\n"
        documents = read_documents([write(tmp_path / name, text)], field="chat")
        assert [d.messages for d in documents] == expected
        assert [d.text for d in documents[:2]] == ["hi\nhello", "one two three"]
        assert documents[2].text == f"{json.dumps(calls)}\nsun"


def test_read_documents_reads_arrays_as_lines(tmp_path):
    """In one line, in many, packed, and named either way."""
    rows = [{"text": "one [x], {y}"}, {"text": "two\n"}, {"text": None}]
    expected = ["one [x], {y}", "two\n"]
    for name in ("a.json", "a.jsonl", "a.json.gz"):
        pack = gzip.compress if name.endswith(".gz") else bytes
        for text in (
            json.dumps(rows),
            json.dumps(rows, indent=2),
            "\n".join(map(json.dumps, rows)),
            f" [\n{json.dumps(rows)[1:]}",
        ):
            assert [d.text for d in read_documents([write(tmp_path / name, pack(text.encode()))])] == expected


def test_template_joins_columns(tmp_path):
    rows = [
        {"instruction": "Add {1}.", "input": "2, 3", "output": 5},
        {"instruction": "Say hi.", "input": None, "output": "hi"},
        {"instruction": None, "input": "", "output": " "},
    ]
    template = "{instruction}\n{input}\n-> {{{output}}}"
    expected = ["Add {1}.\n2, 3\n-> {5}", "Say hi.\n\n-> {hi}"]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert [d.text for d in read_documents([path], template=template)] == expected
    with (tmp_path / "a.csv").open("w", newline="") as file:
        table_of = csv.DictWriter(file, ["output", "instruction", "input"])
        table_of.writeheader()
        table_of.writerows(rows)
    assert [d.text for d in read_documents([str(tmp_path / "a.csv")], template=template)] == expected
    texts = [{**row, "output": str(row["output"])} for row in rows[:2]]
    path = write(tmp_path / "a.parquet", parquet(texts))
    assert [d.text for d in read_documents([path], template=template)] == expected
    for template, message in (
        ("{instruction} {answer}", "a.csv:1: has no field `answer`; there are: output, instruction, input"),
        ("{instruction} {output:>3}", "the template names a column as {column}, not {output:>3}"),
        ("{output!r}", "the template names a column as {column}, not {output}"),
        ("{} and {}", "the template names a column as {column}, not {}"),
        ("{output", "the template cannot be read: expected '}' before end of string; {{ and }} are braces"),
        ("output", "the template names no column: write {column} where its value goes"),
    ):
        with pytest.raises((DataError, ValueError)) as caught:
            read_documents([str(tmp_path / "a.csv")], template=template)
        assert message in str(caught.value)
    with pytest.raises(DataError, match=r"b.jsonl:1: `a` is \[1\], not text"):
        read_documents([write(tmp_path / "b.jsonl", '{"a": [1]}')], template="{a}")


def test_read_documents_refuses_values_that_are_not_text(tmp_path):
    path = write(tmp_path / "a.parquet", parquet([{"text": b"bytes"}]))
    with pytest.raises(DataError, match=r"a.parquet: row 1: `text` is \"b'bytes'\", not text or a list of messages"):
        read_documents([path])
    whole = parquet([{"text": "words " * 1000}])
    for cut in (whole[:-20], whole[:4] + bytes(len(whole) - 300) + whole[-296:]):
        with pytest.raises(DataError, match=r"a.parquet: is damaged: ") as caught:
            read_documents([write(tmp_path / "a.parquet", cut)])
        assert "\n" not in str(caught.value)
    path = write(tmp_path / "b.parquet", parquet([{"text": None}, {"text": "b"}]))
    assert [d.text for d in read_documents([path])] == ["b"]


@pytest.mark.parametrize(("package", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.txt.zst")])
def test_read_documents_names_a_missing_package(tmp_path, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError) as caught:
        read_documents([write(tmp_path / name, b"x")])
    assert str(caught.value).endswith(
        f"{name}: needs the package {package}, which is not installed; pip install 'compress-toolkit[data]'"
    )


def test_documents_imports_no_torch(tmp_path):
    path = write(tmp_path / "a.csv.gz", gzip.compress(b"text\na", mtime=0))
    code = (
        "import sys, compress.data.documents as t; t.read_documents(sys.argv[1:]);"
        "print([m for m in ('torch', 'numpy', 'pyarrow', 'zstandard', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_read_documents_refuses_missing_files_and_folders(tmp_path):
    with pytest.raises(DataError, match=r"gone.txt: there is no such file"):
        read_documents([str(tmp_path / "gone.txt")])
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match=r"folder.txt: cannot be read: Is a directory"):
        read_documents([str(tmp_path / "folder.txt")])
    with pytest.raises(DataError, match=r"gone.txt: cannot be read"):
        fingerprint([str(tmp_path / "gone.txt")])


def test_fingerprint_depends_on_contents_and_order(tmp_path):
    a, b, c = (write(tmp_path / n, t) for n, t in (("a.txt", "x"), ("b.txt", "y"), ("c.txt", "x")))
    assert fingerprint([a, b]) == fingerprint([c, b])
    assert fingerprint([a, b]) != fingerprint([b, a])
    assert fingerprint([a, b]) != fingerprint([a])
