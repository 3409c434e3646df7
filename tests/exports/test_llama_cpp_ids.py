"""Ids of 100 kB of text in llama.cpp and in transformers, for every kind of tokenizer that is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import compress
from compress.architectures.gguf import tokenizers as rules
from tests import pico
from tools.runtimes import llama_cpp

pytest.importorskip("gguf")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (llama_cpp.HOME / llama_cpp.VERSION).exists(), reason="llama.cpp's library is not there"),
]
#: Contractions in both cases, runs of spaces and line ends, digits, other scripts, marks, emoji, and words in capitals.
HARD = (
    "I'll we'VE DON'T it's  two   three\t\ttabs \n\n\n  lines\r\n 1 12 123 1234567 3.14159 ½ Ⅷ ٣٤٥ "
    "naïve café Ångström straße ΑΒΓδε Привет, мир! 你好,世界。 こんにちは 안녕하세요 שלום العربية हिन्दी 🙂👩‍👩‍👧 "
    'HTTPServer camelCase snake_case __init__ a/b//c \\n --flag="x" #!@$%^&*()[]{}<>?;:\'`~ end   \n'
)
VOCABULARY = 2000
ROOT = Path(__file__).resolve().parents[2]


def text() -> str:
    """Prose, code, and what is hard to split, 100 kB."""
    prose, code = (ROOT / name for name in ("examples/text/train.txt", "benchmarks/third/test.txt"))
    return prose.read_text()[:58_000] + HARD * 12 + code.read_text()[:40_000]


def split(name: str) -> pre_tokenizers.PreTokenizer:
    """The steps of tokenizer.json that have llama.cpp's name of rules."""
    if name in ("gpt-2", "smollm"):
        digits = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
        return pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    rule = {"llama-bpe": "cl100k", "dbrx": "cl100k"}.get(name, name)
    pattern = next(pattern for pattern, named in rules._SPLITS.items() if named == rule)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), plain])


def byte_level(name: str, whole_words: bool) -> Tokenizer:
    """A byte-level BPE with these rules, trained on other prose and code."""
    raw = Tokenizer(models.BPE(ignore_merges=whole_words))
    raw.pre_tokenizer, raw.decoder = split(name), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    raw.train_from_iterator(lines(), trainer)
    return raw


def sentencepiece(prefixed: bool) -> Tokenizer:
    """A BPE of SentencePiece, with bytes for what it does not know. ``prefixed``: a space is put before a text."""
    known = Tokenizer(models.BPE())
    known.pre_tokenizer = pre_tokenizers.Metaspace()
    known.train_from_iterator(lines(), trainers.BpeTrainer(vocab_size=VOCABULARY - 300, show_progress=False))
    trained = json.loads(known.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *trained["vocab"]]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(pair) for pair in trained["merges"]]
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    before = [normalizers.Prepend("\u2581")] if prefixed else []
    raw.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "\u2581")])
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    return raw


def lines() -> list[str]:
    """Text to train on: it shares no file with the text that is split."""
    prose, code = (ROOT / name for name in ("examples/text/valid.txt", "benchmarks/third/valid.txt"))
    return [*prose.read_text()[:60_000].splitlines(), *code.read_text()[:60_000].splitlines(), HARD]


KINDS = {name: (byte_level, (name, whole)) for (_, whole), name in rules._NAMES.items()}
KINDS |= {"SentencePiece": (sentencepiece, (True,)), "SentencePiece without a space before": (sentencepiece, (False,))}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kind, tmp_path):
    make, arguments = KINDS[kind]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=make(*arguments), bos_token="<s>", eos_token="</s>")
    source = pico.save(tmp_path / "source", "llama", vocab_size=len(fast), dtype=torch.bfloat16, with_tokenizer=False)
    fast.save_pretrained(source)
    compress.export(source, tmp_path / "out.gguf", to="gguf", type="F32", embeddings="F32")
    whole = text()
    assert len(whole.encode()) >= 100_000
    with llama_cpp.Model(tmp_path / "out.gguf", length=64) as model:
        ids = list(model.tokens(whole))
    expected = fast(whole, add_special_tokens=False)["input_ids"]
    first = next((i for i, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1]), len(expected))
    assert fast.decode(ids[first - 3 : first + 6]) == fast.decode(expected[first - 3 : first + 6])
    assert ids == expected
