from __future__ import annotations

import codecs
import csv
import gzip
import json
import random
import subprocess
import sys
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from compress.data.disjoint import check_disjoint
from compress.data.documents import Document, fingerprint, read_documents
from compress.data.examples import Labels, read_examples
from compress.data.kinds import kind, refusal
from compress.data.rendering import encoded, rendered
from compress.errors import DataError


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
            'a.jsonl:1: `text`: message 2 is from "cat", which is no role; known are: human, user, gpt',
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
        ("a.csv", b'id,text\n1,"a\n2,b\n', "a.csv:3: is no csv: unexpected end of data"),
        ("a.tsv", b'text\n"a" b\n', "a.tsv:2: is no tsv:"),
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
def test_bad_files(tmp_path, name, data, message):
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
def test_every_kind_gives_the_same_documents(tmp_path, name, packing):
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


def test_packed_text_may_come_in_several_frames(tmp_path):
    one, two = b"one\n<|doc|>\n", b"two"
    paths = [
        write(tmp_path / "a.txt.zst", zstandard.compress(one) + zstandard.compress(two)),
        write(tmp_path / "A.TXT.GZ", gzip.compress(one, mtime=0) + gzip.compress(two, mtime=0)),
    ]
    assert [d.text for d in read_documents(paths, "<|doc|>")] == ["one", "two"] * 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_chats(tmp_path, name):
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


def test_chats_of_other_forms(tmp_path):
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


def test_a_call_of_a_tool_is_rendered_by_the_template():
    """As stock does it, with content null."""
    from tests import pico

    tokenizer, calls = pico.tokenizer(), [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    chat = [{"role": "user", "content": "rain?"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    said = rendered(Document("a", "x", tuple(chat)), tokenizer)
    assert said == "<user>rain?<assistant>weather" == tokenizer.apply_chat_template(chat, tokenize=False)


def test_an_array_of_records_is_what_its_lines_are(tmp_path):
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


def test_columns_joined_by_a_template(tmp_path):
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


def test_chat_templates():
    from tests import pico

    tokenizer = pico.tokenizer()
    chat = Document("a.jsonl#4", "hi", ({"role": "user", "content": "hi"},))
    assert rendered(Document("a", "plain"), tokenizer) == "plain"
    with pytest.raises(DataError, match=r"^a.jsonl#4: is a chat, and the tokenizer has no chat template; take"):
        rendered(chat, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    assert rendered(chat, tokenizer) == "<user>hi\n"
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"^a.jsonl#4: does not fit the chat template: roles must alternate$"):
        rendered(chat, tokenizer)


def test_values_that_parquet_can_hold_and_text_cannot(tmp_path):
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
def test_packages_that_are_not_installed(tmp_path, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError) as caught:
        read_documents([write(tmp_path / name, b"x")])
    assert str(caught.value).endswith(
        f"{name}: needs the package {package}, which is not installed; pip install 'compress-toolkit[data]'"
    )


def test_kinds_by_name():
    assert [kind(n) for n in ("a.txt", "b.x.JSONL.gz", "c.gz", "d", "e.npy")] == [".txt", ".jsonl", "", "", ".npy"]
    assert refusal("a.npy", ids=True) is None
    assert refusal("a.csv.zst", ids=True) is None
    assert refusal("README", ids=True).endswith("file (`README`)")


def test_reading_text_imports_nothing_heavy(tmp_path):
    path = write(tmp_path / "a.csv.gz", gzip.compress(b"text\na", mtime=0))
    code = (
        "import sys, compress.data.documents as t; t.read_documents(sys.argv[1:]);"
        "print([m for m in ('torch', 'numpy', 'pyarrow', 'zstandard', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


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


# --- labelled


def labelled(tmp_path, name, text, columns=("sentence",), label="label"):
    (tmp_path / name).write_text(text)
    ids = {"0": 0, 0: 0, "no": 0, "1": 1, 1: 1, "yes": 1}  # as `evaluation.tasks.label_id` would
    return read_examples(
        [str(tmp_path / name)], columns, Labels(label, ids.get, "a label of the model", "there are no, yes")
    )


def test_labelled_rows_of_every_kind(tmp_path):
    expected = [Document("a#0", "a word", label=1), Document("a#1", "another", label=0)]
    texts = {
        "tsv": "label\tsentence\nyes\ta word\n\n0\tanother\n",
        "csv": "sentence,label\na word,1\nanother,no\n",
        "jsonl": '{"sentence": "a word", "label": 1}\n\n{"sentence": "another", "label": "no"}\n',
    }
    for suffix, text in texts.items():
        assert labelled(tmp_path, f"a.{suffix}", text) == [replace(d, id=f"a.{suffix}{d.id[1:]}") for d in expected]
    rows = pyarrow.table({"label": [1, 0], "sentence": ["a word", "another"]})
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet")
    read = read_examples([str(tmp_path / "a.parquet")], ["sentence"], Labels("label", {0: 0, 1: 1}.get, "a label"))
    assert [(d.text, d.label) for d in read] == [(d.text, d.label) for d in expected]
    pairs = labelled(tmp_path, "b.tsv", "one\ttwo\tlabel\nx\ty\tyes\n", columns=("two", "one"))
    assert pairs == [Document("b.tsv#0", "y\nx", pair=("y", "x"), label=1)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "sentence\tlabel\nx\tyes\ny\tmaybe\n", 'a.tsv:3: `label` is "maybe", not a label of the model; there are no, yes'),
        ("a.jsonl", '{"sentence": "x", "label": -1}', "a.jsonl:1: `label` is -1, not a label of the model; there are no, yes"),
        ("a.tsv", "sentence\tclass\nx\tyes\n", "a.tsv:1: has no field `label`; set `label` to one of: sentence, class"),
        ("a.tsv", "text\tlabel\nx\tyes\n", "a.tsv:1: has no field `sentence`; set `text` to one of: text, label"),
        ("a.jsonl", '{"sentence": "x", "label": 1}\n{"sentence": "x"}', "a.jsonl:2: has no field `label`; set `label` to one of: sentence"),
        ("a.csv", "sentence,label\nx,1\n ,1\n", "a.csv:3: `sentence` is empty"),
        ("a.jsonl", '{"sentence": null, "label": 1}', "a.jsonl:1: `sentence` is empty"),
        ("a.jsonl", '{"sentence": 3, "label": 1}', "a.jsonl:1: `sentence` is 3, not text"),
        ("a.jsonl", '{"sentence": "\\ud800", "label": 1}', "a.jsonl:1: `sentence` holds half a surrogate pair, which is no text"),
        ("a.tsv", "sentence\tlabel\n", "a.tsv: holds no row"),
        ("a.txt", "x", "a.txt: has no columns: it is no .jsonl, .json, .csv, .tsv or .parquet file"),
    ],
)  # fmt: skip
def test_labelled_rows_that_will_not_do(tmp_path, name, text, message):
    with pytest.raises(DataError) as caught:
        labelled(tmp_path, name, text)
    assert str(caught.value) == f"{tmp_path}/{message}"


def test_examples_without_labels(tmp_path):
    (tmp_path / "a.tsv").write_text("one\ttwo\nx\ty\nz\t \n")
    assert read_examples([str(tmp_path / "a.tsv")], ["one"]) == [Document("a.tsv#0", "x"), Document("a.tsv#1", "z")]
    with pytest.raises(DataError, match=r"a.tsv:3: `two` is empty"):
        read_examples([str(tmp_path / "a.tsv")], ["one", "two"])


def test_a_text_or_pair_as_a_model_reads_it():
    """The arguments that the tokenizer gets: nothing is cut without a length, and templates bring special tokens."""
    calls = []

    def tokenizer(*texts, **how):
        calls.append((texts, how))
        return {"input_ids": [1]}

    tokenizer.chat_template = "x"
    tokenizer.apply_chat_template = lambda messages, tokenize: messages[0]["content"].upper()
    for document, length in (
        (Document("a", "one"), None),
        (Document("a", "one\ntwo", pair=("one", "two")), 8),
        (Document("a", "hi", ({"role": "user", "content": "hi"},)), 8),
    ):
        assert encoded(document, tokenizer, length) == {"input_ids": [1]}
    cut = {"truncation": True, "max_length": 8, "verbose": False}
    assert calls == [
        (("one",), {"add_special_tokens": True, "verbose": False}),
        (("one", "two"), {"add_special_tokens": True, **cut}),
        (("HI",), {"add_special_tokens": False, **cut}),
    ]
