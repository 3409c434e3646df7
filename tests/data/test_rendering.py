"""Documents as a model reads them: chat templates, special tokens, pairs."""

import pytest

from compress.data.documents import Document
from compress.data.rendering import encoded, rendered
from compress.errors import DataError


def test_rendered_leaves_tool_calls_to_the_template():
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


def test_rendered_applies_the_chat_template():
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


def test_encoded_matches_the_tokenizer():
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
