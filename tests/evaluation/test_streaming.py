"""Documents read in segments through the cache, against one forward pass over the whole of them."""

from __future__ import annotations

import sys

import pytest
import torch

import compress
from compress.architectures.cache import reach
from compress.checkpoint.open import open_headers
from compress.cli import main
from compress.data.documents import Document
from compress.errors import CompressError
from compress.evaluation.language import score_documents
from compress.evaluation.scoring import Stream
from compress.report import figures
from tests import pico

TEXT = "Größe und Länge, a small text of a few words. "
#: Families and changes of their configs: full attention, windows everywhere, windows in some blocks, logits of
#: sinks, learned positions, ALiBi.
KINDS = [
    ("llama", {}),
    ("mistral", {"sliding_window": 7}),
    ("qwen2", {}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("granite_swa", {}),
    ("gpt2", {}),
    ("opt", {}),
    ("bloom", {}),
]


def documents():
    return [Document(f"d#{i}", (TEXT * 2)[i : i + length]) for i, length in enumerate((50, 57, 3, 30, 58, 0, 16, 17))]


@pytest.mark.parametrize(("family", "changes"), KINDS, ids=[family for family, _ in KINDS])
def test_streaming_gives_the_losses_of_one_pass(family, changes):
    model, other = pico.model(family, **changes), pico.model(family, **changes, seed=1)
    how = {"reference": other, "stride": 64}
    whole = score_documents(model, pico.tokenizer(), documents(), window=64, **how).to_dict()
    streamed = score_documents(model, pico.tokenizer(), documents(), window=16, streaming=True, **how).to_dict()
    assert streamed["streaming"] is True
    for key in ("tokens", "bytes"):
        assert streamed[key] == whole[key]
    for key in ("bits_per_byte", "kl", "agreement"):
        assert streamed[key] == pytest.approx(whole[key], rel=1e-5)
    for row, expected in zip(streamed["positions"], whole["positions"], strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_streaming_forgets_what_no_window_sees():
    """A text of several times the positions and the window, against one pass; the cache stays as long as the window."""
    model, tokenizer = pico.model("mistral", sliding_window=7), pico.tokenizer()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT * 6, add_special_tokens=False)["input_ids"]]])
    assert ids.shape[1] > 4 * model.config.max_position_embeddings
    streamed = score_documents(model, tokenizer, [Document("d", TEXT * 6)], window=16, stride=16, streaming=True)
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1]).logits.double()
    nll = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum()
    assert sum(row.nll for row in streamed.documents) == pytest.approx(float(nll), rel=1e-5)
    read = Stream(model)
    with torch.no_grad():
        for segment in ids.split(16, 1):
            read(segment)
            assert all(layer.keys.shape[-2] <= 7 for layer in next(iter(read._cached.values())).layers)


def test_streaming_refuses_models_without_a_cache():
    with pytest.raises(CompressError, match="ViTForImageClassification has no cache to stream text through"):
        Stream(pico.model("vit"))


def recipe(model, tmp_path, **evaluation):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 6, encoding="utf-8")
    return {
        "model": str(model),
        "output": str(tmp_path / "out"),
        "data": {"evaluation": {"files": [str(text)], "window": 16, "streaming": True, **evaluation}},
        "passes": [{"cast": {"weights": "bf16"}}],
    }


def test_a_run_streams_past_the_positions_where_every_block_forgets(tmp_path):
    result = compress.run(recipe(pico.folder("mistral", sliding_window=7), tmp_path))
    evaluation = result.report["result"]["evaluation"]
    assert evaluation["positions"][-1]["from"] == 256
    assert "read through the cache in segments of 16 tokens" in figures.quality_note(result.report)
    model, tokenizer = compress.load(result.checkpoint).float(), pico.tokenizer()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT * 6, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(
            model(input_ids=ids[:, :-1]).logits[0].float(), ids[0, 1:], reduction="sum"
        )
    assert sum(row["nll"] for row in evaluation["documents"]) == pytest.approx(float(nll), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "evaluation", "message"),
    [
        (
            "llama",
            {},
            r"text.txt#0: has 29\d tokens, the model was trained on 64 positions, and not every block of it forgets",
        ),
        ("gpt2", {}, "trained on 64 positions"),
        ("bert", {}, "`streaming` reads text through a cache, and BertForMaskedLM is for masked language modelling"),
        ("llama", {"stride": 8}, "`stride` does not go with `streaming`"),
        ("llama", {"window": 65}, "a window of 65 tokens is beyond the model's 64 positions"),
    ],
)
def test_streams_that_cannot_be_read_are_refused_before_the_work(family, evaluation, message, tmp_path):
    with pytest.raises(CompressError, match=message):
        compress.run(recipe(pico.folder(family), tmp_path, **evaluation))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_eval_streams_and_a_stored_baseline_is_streamed_too(tmp_path, capsys, monkeypatch):
    model, text = str(pico.folder("mistral", sliding_window=7)), tmp_path / "text.txt"
    text.write_text(TEXT * 6, encoding="utf-8")

    def evaluated(*arguments):
        monkeypatch.setattr(sys, "argv", ["compress", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, " ".join((captured.out + captured.err).split())

    how = ("--data", text, "--window", 16, "--streaming")
    baseline = tmp_path / "baseline.json"
    baseline.write_text(evaluated(model, *how, "--json")[1], encoding="utf-8")
    status, _, printed = evaluated(model, "--baseline", baseline)
    assert status in (0, None)
    assert "segments of 16 tokens" in printed
    assert "256 to 511" in printed
    status, _, refusal = evaluated(pico.folder("llama"), *how)
    assert status == 2
    assert "stream shorter documents, or a model with a window in every block" in refusal


@pytest.mark.parametrize(
    ("family", "changes", "tokens"),
    [
        ("llama", {}, 64),
        ("gpt2", {}, 64),
        ("gemma2", {}, 64),  # a window in every second block
        ("bloom", {}, None),  # ALiBi, without a limit in its config
        ("mistral", {"sliding_window": 7}, None),
        ("mistral", {"sliding_window": None}, 64),
    ],
)
def test_reach_is_unlimited_where_every_block_forgets(family, changes, tokens):
    assert reach(open_headers(pico.folder(family, **changes))[0]) == tokens


def local(tmp_path, **settings):
    """A pico Llama with windows for heads, and first tokens that stay."""
    asked = recipe(pico.folder("llama"), tmp_path, streaming=False)
    windows = {"by": "heads", "window": 8, "sinks": 2, "choose": "every", **settings}
    return compress.run({**asked, "store": "compact", "passes": [{"local_attention": windows}]}).checkpoint


@pytest.mark.parametrize("pattern", [pytest.param("window", marks=pytest.mark.slow), "strided"])
def test_streaming_gives_the_losses_of_one_pass_with_windows_by_head(pattern, tmp_path):
    model = compress.load(local(tmp_path, full="50%", pattern=pattern), dtype="float32")
    whole = score_documents(model, pico.tokenizer(), documents(), window=64, stride=64).to_dict()
    streamed = score_documents(model, pico.tokenizer(), documents(), window=16, stride=16, streaming=True).to_dict()
    assert streamed["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=1e-5)


@pytest.mark.slow
def test_streaming_past_the_positions_meets_first_tokens_as_single_steps_do(tmp_path):
    """Every head is local, so the text may go on without end; the reference reads it token by token."""
    folder = local(tmp_path, full=0)
    assert reach(open_headers(folder)[0]) is None
    model, tokenizer = compress.load(folder, dtype="float32"), pico.tokenizer()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT * 3, add_special_tokens=False)["input_ids"]]])
    assert ids.shape[1] > 2 * 64
    streamed = score_documents(model, tokenizer, [Document("d", TEXT * 3)], window=16, stride=16, streaming=True)
    read, nll = Stream(model), 0.0
    with torch.no_grad():
        for step in range(ids.shape[1] - 1):
            nll -= float(read(ids[:, step : step + 1])[0, -1].log_softmax(-1)[ids[0, step + 1]])
    assert sum(row.nll for row in streamed.documents) == pytest.approx(nll, rel=1e-5)
