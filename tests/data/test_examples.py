"""Labelled texts and pairs from files with named fields."""

from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest

from compress.data.documents import Document
from compress.data.examples import Labels, read_examples
from compress.errors import DataError


def labelled(tmp_path, name, text, columns=("sentence",), label="label"):
    (tmp_path / name).write_text(text)
    ids = {"0": 0, 0: 0, "no": 0, "1": 1, 1: 1, "yes": 1}  # as `evaluation.tasks.label_id` would
    return read_examples(
        [str(tmp_path / name)], columns, Labels(label, ids.get, "a label of the model", "there are no, yes")
    )


def test_read_examples_reads_every_kind(tmp_path):
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
        ("a.jsonl", '{"sentence": "\\ud800", "label": 1}', "a.jsonl:1: `sentence` holds half a surrogate pair, which is not a text"),
        ("a.tsv", "sentence\tlabel\n", "a.tsv: holds no row"),
        ("a.txt", "x", "a.txt: has no columns: it is no .jsonl, .json, .csv, .tsv or .parquet file"),
    ],
)  # fmt: skip
def test_read_examples_names_what_is_wrong_with_a_row(tmp_path, name, text, message):
    with pytest.raises(DataError) as caught:
        labelled(tmp_path, name, text)
    assert str(caught.value) == f"{tmp_path}/{message}"


def test_read_examples_reads_texts_without_labels(tmp_path):
    (tmp_path / "a.tsv").write_text("one\ttwo\nx\ty\nz\t \n")
    assert read_examples([str(tmp_path / "a.tsv")], ["one"]) == [Document("a.tsv#0", "x"), Document("a.tsv#1", "z")]
    with pytest.raises(DataError, match=r"a.tsv:3: `two` is empty"):
        read_examples([str(tmp_path / "a.tsv")], ["one", "two"])
