"""Windows of packed text, and documents by themselves, drawn by seed."""

import random

import pytest
import torch

from compress.data.batches import Batches
from compress.data.documents import Document
from compress.data.sampling import every_window, sample_documents, sample_windows
from compress.errors import DataError
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


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_sample_windows_draws_the_same_as_earlier_versions(tokenizer):
    drawn = sample_windows(tokenizer, documents(), 6, 16, 5)
    assert drawn.ids.dtype == torch.int64
    assert drawn.sha256() == "8cab60ac9f72d82e91fdbe5b9faccdc5f18f21a688c3bb73c0e2a402afebf56b"
    assert drawn.mask is None


def test_sample_windows_names_where_each_begins(tokenizer):
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


def test_a_text_much_longer_than_the_stream_is_drawn_in_pieces(tokenizer):
    lines = "\n".join(d.text for d in documents(200))
    text = Document("long.txt#0", lines)
    assert len(lines) > 16 * 4 * 6 * 16
    read = []

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, **options):
            read.append(len(text))
            return tokenizer(text, **options)

    drawn = sample_windows(Counting(), [text], 6, 16, 1)
    assert sum(read) < len(lines) / 4
    places = [int(place.partition("@")[2].partition("+")[0]) for place in drawn.chosen]
    assert len(set(places)) > 1
    assert all(place == 0 or lines[place - 1] == "\n" for place in places)
    for ids, place, at in zip(drawn.ids.tolist(), drawn.chosen, places, strict=True):
        start = int(place.partition("+")[2])
        inside = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
        assert tokens(tokenizer, lines[at : at + 1024])[start : start + len(inside)] == inside
    whole = sample_windows(tokenizer, [Document("long.txt#0", lines[:4000])], 6, 16, 1)
    assert not any("@" in place for place in whole.chosen)


def test_sampling_refuses_too_little_text(tokenizer):
    with pytest.raises(DataError, match=r"asks for 9 samples of 500 tokens, the text gives 0"):
        sample_windows(tokenizer, documents(1), 9, 500, 0)
    with pytest.raises(DataError, match=r"asks for 9 padded documents, the text has 3; name more"):
        sample_documents(tokenizer, documents(3), 9, 500, 0)


def test_sample_documents_pads_and_masks(tokenizer):
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


def test_sample_documents_adds_special_tokens(tokenizer):
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


def test_sampling_renders_chats():
    tokenizer = pico.tokenizer()
    tokenizer.chat_template = TEMPLATE
    chat = Document("a", "hi\nho", ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}))
    whole = tokens(tokenizer, "<user>hi<assistant>ho")
    assert sample_documents(tokenizer, [chat], 1, len(whole), 0).ids[0].tolist() == whole
    assert sample_windows(tokenizer, [chat], 1, len(whole), 0).ids[0].tolist() == whole
    with pytest.raises(DataError, match=r"a: is a chat, and the tokenizer has no chat template"):
        sample_windows(pico.tokenizer(), [chat], 1, 4, 0)


def test_sample_documents_draws_pairs_with_types():
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


def test_windows_begin_with_the_beginning_of_text(tokenizer):
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


def test_chat_windows_have_one_beginning_of_text():
    begins = pico.tokenizer(begins=True)
    begins.chat_template = "{{ bos_token }}" + TEMPLATE
    chats = [Document(f"a#{i}", "hi", ({"role": "user", "content": "hi" * 9},)) for i in range(4)]
    one = [*tokens(begins, "<user>" + "hi" * 9), begins.eos_token_id]
    drawn = every_window(begins, chats, len(one) + 1, 0)
    assert drawn.ids.tolist() == [[257, *one]] * 4


def test_every_window_holds_all_text_in_seeded_order():
    tokenizer = pico.tokenizer()
    documents = [Document(f"d{i}", chr(97 + i) * 30) for i in range(4)]
    one, other = (every_window(tokenizer, documents, 10, seed) for seed in (0, 1))
    assert one.ids.shape == (12, 10)  # 4 × 31 tokens with the ends of documents
    assert one.ids.flatten().sort().values.tolist() != other.ids.flatten().tolist()
    assert not torch.equal(one.ids, other.ids)
    assert len(set(one.chosen)) == 12
