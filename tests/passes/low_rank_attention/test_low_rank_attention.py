"""Projected keys and values against the formula of the paper, with padding, in stock loaders, and fitted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compress
from compress.architectures.model_map import model_map
from compress.checkpoint.open import open_checkpoint
from compress.errors import CompressError
from compress.evaluation.examples import longest_text
from compress.planning import size_on_disk
from tests import pico, processes

RANK, POSITIONS = 12, 64
ENCODERS = ["bert", "roberta", "electra", "distilbert", "albert"]


def recipe(family, texts, folder, **settings):
    train, _ = texts
    return {
        "model": str(pico.folder(family)),
        "output": str(folder / "out"),
        "store": "compact",
        "document_separator": "<|doc|>",
        "data": {
            "calibration": {"files": [str(train)], "samples": 12, "length": 48},
        },
        "passes": [{"low_rank_attention": {"rank": RANK, **settings}}],
    }


@pytest.fixture(scope="module")
def written(texts, tmp_path_factory):
    """A run on the pico BERT."""
    return compress.run(recipe("bert", texts, tmp_path_factory.mktemp("linformer")))


def by_formula(module, hidden, lengths):
    """softmax(Q (E K)ᵀ / √d) F V of a BERT's attention module, text by text; padding is cut off first."""
    outputs = torch.zeros_like(hidden)
    heads, width = module.num_attention_heads, module.attention_head_size
    for number, length in enumerate(lengths):
        own = hidden[number, :length]
        q, k, v = (f(own).view(length, heads, width).transpose(0, 1) for f in (module.query, module.key, module.value))
        columns = [(2 * p + 1) * POSITIONS // (2 * length) for p in range(length)]
        if length > RANK:
            k = module.keys_projection[:, columns] * (POSITIONS / length) @ k
            v = module.values_projection[:, columns] * (POSITIONS / length) @ v
        out = (q @ k.transpose(1, 2) / width**0.5).softmax(-1) @ v
        outputs[number, :length] = out.transpose(0, 1).flatten(1)
    return outputs


def test_attention_is_that_of_the_formula_with_any_padding(written):
    model = compress.load(written.checkpoint)
    module = model.bert.encoder.layer[1].attention.self
    with torch.no_grad():
        for parameter in (module.keys_projection, module.values_projection):
            parameter += 0.1 * torch.randn_like(parameter)
    seen = []
    module.register_forward_hook(
        lambda m, args, kwargs, output: seen.append((args, kwargs, output[0])), with_kwargs=True
    )
    lengths = [64, 40, 12, 5, 33]
    ids = torch.randint(3, 250, (len(lengths), 64))
    mask = torch.tensor([[1] * length + [0] * (64 - length) for length in lengths])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        args, kwargs, output = seen[0]
        hidden = args[0] if args else kwargs["hidden_states"]
        expected = by_formula(module, hidden, lengths)
        for number, length in enumerate(lengths):
            torch.testing.assert_close(output[number, :length], expected[number, :length], rtol=1e-4, atol=1e-5)
            alone = model(input_ids=ids[number : number + 1, :length]).logits
            torch.testing.assert_close(alone[0], logits[number, :length], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", pico.families(ENCODERS))
def test_short_texts_are_computed_as_before(family, texts, tmp_path):
    out = compress.run(recipe(family, texts, tmp_path, iterations=0)).checkpoint
    ids = torch.arange(20, 20 + RANK)[None]
    with torch.no_grad():
        before = compress.load(pico.folder(family))(input_ids=ids)[0]
        model = compress.load(out)
        torch.testing.assert_close(model(input_ids=ids)[0], before, rtol=1e-4, atol=1e-5)
        longer = torch.arange(20, 20 + 3 * RANK)[None]
        assert not torch.allclose(model(input_ids=longer)[0], compress.load(pico.folder(family))(input_ids=longer)[0])


def test_plan_is_exact_and_the_fit_lowers_the_error(written):
    row = written.report["stages"][0]["passes"][0]
    assert row["exact"]
    assert row["planned"] == row["actual"]
    spec = open_checkpoint(written.checkpoint).spec
    assert spec.tensors["bert.encoder.layer.0.attention.self.values_projection"].shape == (RANK, POSITIONS)
    original = size_on_disk(open_checkpoint(pico.folder("bert")))
    assert row["actual"]["parameters"] - original.parameters == 4 * 2 * RANK * POSITIONS
    for block in row["details"]["blocks"]:
        assert block["projection"]["after"] < block["projection"]["before"]


def test_result_loads_by_its_own_file_without_the_package(written, tmp_path):
    ids = torch.arange(10, 58)[None]
    script = (
        "import torch\n"
        "from transformers import AutoModelForMaskedLM\n"
        f"model = AutoModelForMaskedLM.from_pretrained({str(written.checkpoint)!r}, trust_remote_code=True)\n"
        f"torch.save(model(torch.arange(10, 58)[None]).logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    processes.run(script, foreign=True).check_returncode()
    theirs = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        torch.testing.assert_close(compress.load(written.checkpoint)(input_ids=ids).logits, theirs)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {}, "llama is no encoder: later keys are not there when a token is generated"),
        ("t5", {}, "t5 is no encoder"),
        ("bert", {"rank": 64}, "a rank of 64 is no less than the 64 positions of the longest text"),
        ("bert", {"rank": 48}, "samples of 48 tokens are no longer than the rank 48"),
        ("bert", {"positions": 40}, "samples of 48 tokens are longer than the 40 positions of the longest text"),
        ("bert", {"positions": 65}, "the model has 64 positions"),
        ("bert", {"only": ["*0*"]}, "every block is projected"),
    ],
)
def test_models_and_settings_that_do_not_fit_are_refused(family, settings, message, texts, tmp_path):
    asked = recipe(family, texts, tmp_path, **settings)
    with pytest.raises(CompressError, match=message):
        compress.run(asked)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_texts_beyond_the_projections_are_refused(texts, tmp_path):
    out = compress.run(recipe("bert", texts, tmp_path, positions=32, iterations=0, rank=8)).checkpoint
    model = compress.load(out)
    assert longest_text(model, pico.tokenizer()) == 32  # evaluation cuts there
    assert model_map(open_checkpoint(out).spec).positions == 32  # later passes refuse longer samples
    with pytest.raises(ValueError, match="a text of 40 tokens is beyond the 32 positions of its projections"):
        model(input_ids=torch.arange(40)[None])


def test_fit_that_does_not_help_leaves_the_means(tmp_path):
    examples = Path(__file__).resolve().parents[3] / "examples"
    data = {"files": [str(examples / "text" / "lines.train.tsv")], "text": "text", "samples": 4, "length": 48}
    result = compress.run({
        "model": str(examples / "tiny-classifier"),
        "output": str(tmp_path / "out"),
        "store": "compact",
        "data": {"calibration": data},
        "passes": [{"low_rank_attention": {"rank": 16, "iterations": 1}}],
    })  # fmt: skip
    blocks = result.report["stages"][0]["passes"][0]["details"]["blocks"]
    kept = [b["block"] for b in blocks if b["projection"]["after"] == b["projection"]["before"]]
    assert kept
    model = compress.load(result.checkpoint)
    for number in kept:
        module = model.bert.encoder.layer[number].attention.self
        torch.testing.assert_close(module.values_projection, module.keys_projection)


def test_stock_files_are_refused_with_words_for_projections(texts, tmp_path):
    asked = {**recipe("bert", texts, tmp_path), "store": "stock"}
    with pytest.raises(
        CompressError, match=r"projects its keys and values along the text\n   use `store: compact`, or leave"
    ):
        compress.run(asked)
