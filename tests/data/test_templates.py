"""Chat templates that would not end, or make huge texts, are refused in one line; all others give what transformers gives."""

from __future__ import annotations

import threading
import time

import pytest

from compress.data import templates
from compress.data.documents import Document
from compress.data.rendering import rendered
from compress.errors import DataError

MESSAGES = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"})


def test_rendered_matches_transformers(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ '%5d' % 3 }}{{ m.role * 2 }}: {{ m.content }}\n{% endfor %}"
    expected = tokenizer.apply_chat_template([dict(m) for m in MESSAGES], tokenize=False)
    assert templates.apply(tokenizer, MESSAGES) == expected
    assert rendered(Document("x#0", "", MESSAGES), tokenizer) == expected


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("main", [True, False])
def test_rendered_stops_nested_loops(main, tokenizer):
    tokenizer.chat_template = LOOPS
    caught: list[BaseException] = []

    def work() -> None:
        try:
            templates.apply(tokenizer, MESSAGES, seconds=0.3)
        except ValueError as error:
            caught.append(error)

    before, start = threading.active_count(), time.monotonic()
    if main:
        work()
    else:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert str(caught[0]) == "it runs for more than 0.3 s"
    assert time.monotonic() - start < 30
    for _ in range(300):  # it was told to stop, and does
        if threading.active_count() == before:
            break
        time.sleep(0.1)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 9 ** 9 ** 9 }}", "`**`"), ("{{ 'x' * 10000000000 }}", "10000000000"), ("{{ '%999999999d' % 1 }}", "'%999999999d'"), ("{{ '{:>999999999}'.format(1) }}", "'{:>999999999}'"),
        ("{{ 'x'|center(0xfffffff) }}", "0xfffffff"), ("{{ 'x' * 1_000_000_000 }}", "1_000_000_000"),
    ],
)  # fmt: skip
def test_rendered_stops_huge_texts(template, message, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(DataError) as caught:
        rendered(Document("x#0", "", MESSAGES), tokenizer)
    assert (
        str(caught.value)
        == f"x#0: does not fit the chat template: it computes with {message}, which would make huge texts"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ raise_exception('no') }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ messages[9].content.x }}",
    ],
)
def test_rendered_tells_template_errors_in_one_line(template, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match="does not fit the chat template: ") as caught:
        rendered(Document("x#0", "", MESSAGES), tokenizer)
    assert "\n" not in str(caught.value)
