from __future__ import annotations

import hashlib
import random
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import save_file

from compress.checkpoint.open import open_checkpoint
from compress.data.batches import Batches, check_vocabulary, first
from compress.data.documents import Document
from compress.data.sampling import every_window, sample_documents, sample_windows
from compress.data.token_ids import given_ids, read_ids
from compress.errors import DataError
from compress.models.loading import load_model
from compress.passes.blockwise import open_runner
from compress.progress import SilentProgress
from compress.sensitivity.block_influence import block_influence
from compress.workspace import Workspace
from tests import pico

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def documents(count=20, words=60):
    generator = random.Random(0)
    return [
        Document(
            f"a.txt#{i}",
            " ".join("".join(generator.choices("abcdefghij", k=generator.randint(2, 7))) for _ in range(words)),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return pico.tokenizer()


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- packed


def test_packed_windows_are_those_of_earlier_versions(tokenizer):
    drawn = sample_windows(tokenizer, documents(), 6, 16, 5)
    assert drawn.ids.dtype == torch.int64
    assert drawn.sha256() == "8cab60ac9f72d82e91fdbe5b9faccdc5f18f21a688c3bb73c0e2a402afebf56b"
    assert drawn.mask is None


def test_packed_windows_say_where_they_begin(tokenizer):
    texts = {d.id: tokens(tokenizer, d.text) for d in documents()}
    drawn = sample_windows(tokenizer, documents(), 40, 16, 1)
    assert len(set(drawn.chosen)) == 40
    for ids, place in zip(drawn.ids.tolist(), drawn.chosen, strict=True):
        name, _, start = place.partition("+")
        inside = (texts[name] + [tokenizer.eos_token_id])[int(start) :][:16]
        assert ids[: len(inside)] == inside
        assert len(inside)
    assert sample_windows(tokenizer, documents(), 40, 16, 1).sha256() == drawn.sha256()
    assert sample_windows(tokenizer, documents(), 40, 16, 2).chosen != drawn.chosen


def test_too_little_text(tokenizer):
    with pytest.raises(DataError, match=r"asks for 9 samples of 500 tokens, the text gives 0"):
        sample_windows(tokenizer, documents(1), 9, 500, 0)
    with pytest.raises(DataError, match=r"asks for 9 padded documents, the text has 3; name more"):
        sample_documents(tokenizer, documents(3), 9, 500, 0)


# --- padded


def test_padded_documents_stand_by_themselves(tokenizer):
    some = [*documents(10), Document("b.txt#0", "short"), Document("b.txt#1", "é")]
    drawn = sample_documents(tokenizer, some, 12, 32, 3)
    assert sorted(drawn.chosen) == sorted(d.id for d in some)
    assert drawn.ids.shape == drawn.mask.shape == (12, 32)
    assert (drawn.ids.dtype, drawn.mask.dtype) == (torch.int64, torch.bool)
    texts = {d.id: d.text for d in some}
    for ids, mask, name in zip(drawn.ids, drawn.mask, drawn.chosen, strict=True):
        expected = tokens(tokenizer, texts[name])[:32]
        assert ids[mask].tolist() == expected
        assert mask.tolist() == [True] * len(expected) + [False] * (32 - len(expected))
        assert ids[~mask].eq(tokenizer.eos_token_id).all()
    again = sample_documents(tokenizer, some, 12, 32, 3)
    assert (again.chosen, again.sha256()) == (drawn.chosen, drawn.sha256())
    few = sample_documents(tokenizer, some, 4, 32, 4)
    assert few.chosen != drawn.chosen[:4]


def test_padded_documents_get_the_special_tokens_of_the_tokenizer(tokenizer):
    from tokenizers import processors

    special = pico.tokenizer()
    special.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    drawn = sample_documents(special, [Document("a", "word")], 1, 8, 0)
    assert drawn.ids[0].tolist() == [0, *tokens(tokenizer, "word"), 0, 0, 0]
    assert drawn.mask[0].tolist() == [True] * 5 + [False] * 3
    special.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    cut = sample_documents(special, [Document("a", "word")], 1, 4, 0)
    assert cut.ids[0].tolist() == [0, *tokens(tokenizer, "wo"), 0]
    assert cut.mask.all()
    with pytest.raises(DataError, match=r"documents of 2 tokens, and 2 of them are special ones; set length to 3"):
        sample_documents(special, [Document("a", "word")], 1, 2, 0)
    special.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    chat = Document("a", "word", ({"role": "user", "content": "word"},))
    special.chat_template = "{{ messages[0].content }}"
    assert sample_documents(special, [chat], 1, 4, 0).ids[0].tolist() == tokens(tokenizer, "word")


def test_chats_are_shown_in_their_template():
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = TEMPLATE
    chat = Document("a", "hi\nho", ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}))
    whole = tokens(tokenizer, "<user>hi<assistant>ho")
    assert sample_documents(tokenizer, [chat], 1, len(whole), 0).ids[0].tolist() == whole
    assert sample_windows(tokenizer, [chat], 1, len(whole), 0).ids[0].tolist() == whole
    with pytest.raises(DataError, match=r"a: is a chat, and the tokenizer has no chat template"):
        sample_windows(pico.tokenizer(), [chat], 1, 4, 0)


def test_parts_cover_every_sample():
    ids = torch.arange(35).reshape(7, 5)
    parts = Batches(ids, ids % 2 == 0, tuple("abcdefg"), ids % 3).parts(11)
    assert [len(p.ids) for p in parts] == [2, 2, 2, 1]
    assert torch.equal(torch.cat([p.ids for p in parts]), ids)
    assert torch.equal(torch.cat([p.mask for p in parts]), ids % 2 == 0)
    assert torch.equal(torch.cat([p.inputs("cpu")["token_type_ids"] for p in parts]), ids % 3)
    assert "".join(c for p in parts for c in p.chosen) == "abcdefg"
    assert [(len(p.ids), p.mask, list(p.inputs("cpu"))) for p in Batches(ids).parts(1)] == [
        (1, None, ["input_ids"])
    ] * 7


def test_the_hash_is_of_ids_and_mask():
    ids = torch.tensor([[1, 2], [3, 4]])
    data = ids.numpy().astype("<i8").tobytes()
    assert Batches(ids).sha256() == hashlib.sha256(data).hexdigest()
    assert Batches(ids.T.contiguous().T).sha256() == Batches(ids).sha256()
    mask = torch.tensor([[True, True], [True, False]])
    assert Batches(ids, mask).sha256() == hashlib.sha256(data + b"\x01\x01\x01\x00").hexdigest()


# --- token ids


@pytest.mark.parametrize("kind", ["int64", "int32", "uint16", ">i4"])
def test_ids_of_npy(tmp_path, kind):
    ids = torch.randint(0, 300, (5, 7))
    numpy.save(tmp_path / "ids.npy", ids.numpy().astype(kind))
    read = read_ids(tmp_path / "ids.npy")
    assert read.ids.dtype == torch.int64
    assert torch.equal(read.ids, ids)
    assert read.mask is None
    assert read.chosen == tuple(f"ids.npy#{i}" for i in range(5))


def test_ids_of_safetensors(tmp_path):
    a, b = torch.randint(0, 300, (5, 7)), torch.randint(0, 300, (2, 3), dtype=torch.int32)
    save_file({"only": b}, tmp_path / "one.safetensors")
    save_file({"a": a, "b": b}, tmp_path / "two.safetensors")
    save_file({"a": a, "text": b}, tmp_path / "text.safetensors")
    assert torch.equal(read_ids(tmp_path / "one.safetensors").ids, b.long())
    assert torch.equal(read_ids(str(tmp_path / "two.safetensors"), "a").ids, a)
    assert torch.equal(read_ids(tmp_path / "text.safetensors").ids, b.long())
    with pytest.raises(DataError, match=r"two.safetensors: has no tensor `text`; set `field` to one of: a, b"):
        read_ids(tmp_path / "two.safetensors")
    with pytest.raises(DataError, match=r"one.safetensors: has no tensor `a`; set `field` to one of: only"):
        read_ids(tmp_path / "one.safetensors", "a")


def npy(array):
    import io

    stream = io.BytesIO()
    numpy.save(stream, array, allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.npy", b"", "a.npy: is empty"),
        ("a.npy", b"no array at all", "a.npy: is no array: the magic string is not correct"),
        ("a.npy", npy(numpy.zeros((4, 4), "i8"))[:-5], "a.npy: is no array: Failed to read all data"),
        ("a.npy", npy(numpy.array([[{}]], object)), "a.npy: is no array: Object arrays cannot be loaded"),
        (
            "a.npy",
            npy(numpy.zeros((4, 4), "f4")),
            "a.npy: holds float32, not token ids; save integers [samples, length]",
        ),
        ("a.npy", npy(numpy.zeros((4, 4), "?")), "a.npy: holds bool, not token ids"),
        ("a.npy", npy(numpy.zeros(4, "i8")), "a.npy: has the shape [4], which is not [samples, length]; save"),
        ("a.npy", npy(numpy.zeros((2, 2, 2), "i8")), "a.npy: has the shape [2, 2, 2], which is not"),
        ("a.npy", npy(numpy.zeros((0, 4), "i8")), "a.npy: holds no token: its shape is [0, 4]"),
        ("a.safetensors", b"", "a.safetensors: is empty"),
        ("a.safetensors", b"nothing like it", "a.safetensors: is damaged: "),
    ],
)
def test_bad_ids(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_ids(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
def test_ids_that_are_not_there(tmp_path, name):
    with pytest.raises(DataError, match=rf"{name}: there is no such file"):
        read_ids(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"{name}: (cannot be read|is damaged): "):
        read_ids(tmp_path / name)


def test_given_tensors():
    assert given_ids(torch.ones(2, 3, dtype=torch.int32)).chosen == ("data#0", "data#1")
    for tensor, message in (
        (torch.ones(2, 3), "data: holds float32, not token ids"),
        (torch.ones(2, 3, dtype=torch.bool), "data: holds bool, not token ids"),
        (torch.ones(3, dtype=torch.long), "data: has the shape [3], which is not [samples, length]"),
    ):
        with pytest.raises(DataError) as caught:
            given_ids(tensor)
        assert message in str(caught.value)


def test_the_first_rows_and_tokens():
    batches = given_ids(torch.arange(12).reshape(3, 4))
    assert torch.equal(first(batches, None, None, "x").ids, batches.ids)
    cut = first(batches, 2, 3, "x")
    assert (cut.ids.tolist(), cut.chosen) == ([[0, 1, 2], [4, 5, 6]], ("data#0", "data#1"))
    with pytest.raises(DataError, match=r"x: holds 3 samples of 4 tokens, 4 of 4 are asked for; leave out"):
        first(batches, 4, None, "x")
    with pytest.raises(DataError, match=r"x: holds 3 samples of 4 tokens, 3 of 5 are asked for"):
        first(batches, None, 5, "x")


def test_ids_beyond_the_vocabulary():
    batches = given_ids(torch.tensor([[1, 2], [3, 300]]), "ids.npy")
    check_vocabulary(batches, 301)
    check_vocabulary(batches, None)
    with pytest.raises(DataError) as caught:
        check_vocabulary(batches, 300, "here/ids.npy")
    assert str(caught.value) == (
        "here/ids.npy: ids.npy#1 has token 300 at 1, the model knows 0 to 299; use the tokenizer that belongs to the model"
    )
    with pytest.raises(DataError, match=r"^data#0 has token -100 at 1; use"):
        check_vocabulary(given_ids(torch.tensor([[1, -100]])), None)


# --- influence


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "bert"])
def test_padding_does_not_count(family, tmp_path):
    """Samples of several lengths, padded, score as they do one by one."""
    checkpoint = open_checkpoint(pico.save(tmp_path / "in", family))
    how = {"dtype": "float32", "device": "cpu", "progress": SilentProgress()}
    lengths = (40, 24, 5)
    rows = [torch.randint(2, 250, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    ids, mask = torch.zeros(3, 40, dtype=torch.long), torch.zeros(3, 40, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    padded = block_influence(checkpoint, Batches(ids, mask), **how)
    single = [block_influence(checkpoint, Batches(row[None]), **how) for row in rows]
    expected = [sum(n * s[b] for n, s in zip(lengths, single, strict=True)) / sum(lengths) for b in range(4)]
    assert padded == pytest.approx(expected, rel=1e-4)
    assert block_influence(checkpoint, Batches(ids), **how) != pytest.approx(expected, rel=1e-4)


def test_pairs_are_drawn_as_the_model_sees_them():
    """Special tokens stay whole, the longer text is cut, and types tell the texts apart."""
    from tokenizers import processors

    tokenizer = pico.tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>",
        pair="<|endoftext|> $A <|endoftext|> $B:1 <|endoftext|>:1",
        special_tokens=[("<|endoftext|>", 0)],
    )
    pairs = [Document(f"d#{i}", "", pair=("abc" * (i + 1), "xy")) for i in range(6)]
    drawn = sample_documents(tokenizer, pairs, 6, 16, 0)
    assert list(drawn.values) == ["input_ids", "token_type_ids"]
    assert sorted(drawn.mask.sum(1).tolist()) == [8, 11, 14, 16, 16, 16]
    for ids, mask, types, name in zip(drawn.ids, drawn.mask, drawn.types, drawn.chosen, strict=True):
        pair = pairs[int(name.partition("#")[2])].pair
        expected = tokenizer(*pair, truncation=True, max_length=16)
        assert ids[mask].tolist() == expected["input_ids"]
        assert types[mask].tolist() == expected["token_type_ids"]
        assert not types[~mask].any()
        assert ids[mask][-4:].tolist() == [0, *tokens(tokenizer, "xy"), 0]
    assert drawn.sha256() != Batches(drawn.ids, drawn.mask).sha256()
    assert sample_documents(tokenizer, [Document("a", "abc")], 1, 8, 0).types is None
    with pytest.raises(
        DataError, match="documents of 3 tokens, and 3 of them are special ones; set length to 4 or more"
    ):
        sample_documents(tokenizer, pairs, 6, 3, 0)


def test_a_sweep_reads_the_types_of_pairs(tmp_path):
    """Pruned block by block with types, BERT's blocks see what the model whole sees; without them something else."""
    folder = pico.save(tmp_path / "in", "bert")
    ids = torch.randint(2, 250, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < torch.tensor([12, 9, 12, 5])[:, None]
    types = ((torch.arange(12) > 3) & mask).long()
    model = load_model(folder)
    outputs = []
    for batches in (Batches(ids, mask, ("a",) * 4, types), Batches(ids, mask, ("a",) * 4)):
        runner = open_runner(
            open_checkpoint(folder),
            ["bert.encoder.layer.3.output.dense.weight"],
            SimpleNamespace(
                data=lambda name, batches=batches: batches, dtype="float32", device="cpu", progress=SilentProgress(), seed=0
            ),
            workspace=Workspace(tmp_path / str(len(outputs))),
            with_targets=False,
        )  # fmt: skip
        found = []
        runner.run(lambda block, found=found: found.append(block.inputs.read([0, 1, 2, 3]).clone()) or {}, "look")
        outputs.append(found[-1])
    with torch.no_grad():
        args = {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": types, "output_hidden_states": True}
        expected = model(**args).hidden_states[3]
    assert torch.allclose(outputs[0][mask], expected[mask], atol=1e-5)
    assert not torch.allclose(outputs[1][mask], expected[mask], atol=1e-2)


# --- the beginning-of-text token


def test_windows_begin_as_the_tokenizer_begins_texts(tokenizer):
    """One before each; the rest is the stream of the same tokenizer without one."""
    begins = pico.tokenizer(begins=True)
    some = documents()
    order = list(some)
    random.Random(1).shuffle(order)
    stream = [token for d in order for token in [*tokens(tokenizer, d.text), tokenizer.eos_token_id]]
    drawn = sample_windows(begins, some, 40, 16, 1)
    whole = every_window(begins, some, 16, 1)
    for found in (drawn, whole):
        assert found.ids.shape[1] == 16
        assert found.ids[:, 0].eq(257).all()
        assert not found.ids[:, 1:].eq(257).any()
    places = {d.id: len([t for e in order[:i] for t in tokens(tokenizer, e.text)]) + i for i, d in enumerate(order)}
    for ids, place in zip(drawn.ids.tolist(), drawn.chosen, strict=True):
        name, _, start = place.partition("+")
        at = places[name] + int(start)
        assert ids == [257, *stream[at : at + 15]]
    assert len(whole.ids) == len(stream) // 15
    assert sorted(whole.ids[:, 1:].flatten().tolist()) == sorted(stream[: len(whole.ids) * 15])
    with pytest.raises(
        DataError, match=r"a sample of 1 token has no room beside the beginning-of-text token; set length"
    ):
        sample_windows(begins, some, 1, 1, 0)


def test_a_template_that_spells_the_beginning_gives_no_second_one():
    begins = pico.tokenizer(begins=True)
    begins.chat_template = "{{ bos_token }}" + TEMPLATE
    chats = [Document(f"a#{i}", "hi", ({"role": "user", "content": "hi" * 9},)) for i in range(4)]
    one = [*tokens(begins, "<user>" + "hi" * 9), begins.eos_token_id]
    drawn = every_window(begins, chats, len(one) + 1, 0)
    assert drawn.ids.tolist() == [[257, *one]] * 4
