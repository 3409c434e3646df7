"""Exports in llama.cpp itself: logits of every family. `make test-all` runs them; test_llama_cpp_ids.py has the ids.

They need the library of `tools.runtimes.llama_cpp`; any command of that module fetches it.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from tests import pico
from tests.checkpoint.dequantize.fixtures.make_gguf import tokenizer
from tools.runtimes import llama_cpp

pytest.importorskip("gguf")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (llama_cpp.HOME / llama_cpp.VERSION).exists(), reason="llama.cpp's library is not there"),
]
WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
FAMILIES = {
    "llama": WIDE,
    "mistral": {**WIDE, "sliding_window": None},
    "qwen2": {"hidden_size": 64, "intermediate_size": 64, "use_sliding_window": False, "sliding_window": None},
    "qwen3": WIDE,
    "gemma2": {**WIDE, "sliding_window": 16},
    "gemma3_text": {**WIDE, "sliding_window": 16},
    "phi3": {"hidden_size": 64, "intermediate_size": 64},
    "mixtral": {"hidden_size": 64, "intermediate_size": 64},
    "qwen3_moe": {
        **WIDE,
        "num_hidden_layers": 2,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
    },
    "gpt2": {"n_embd": 64},
}
#: Rounded inputs make routers choose other experts for a few tokens, which is no small difference there.
ROUTED = ("mixtral", "qwen3_moe")


def calm(folder, family):
    """A pico checkpoint whose weights are small, so that rounding is not amplified from block to block."""
    pico.save(folder, family, dtype=torch.bfloat16, **FAMILIES[family])
    weights = {k: v * 0.3 if v.ndim > 1 else v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(folder)
    return folder


def divergence(folder, file):
    """KL from transformers' distribution to llama.cpp's, nats for each token."""
    loaded = compress.load(folder, dtype="float32")
    ids = torch.randint(3, 250, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = loaded(ids).logits.double().log_softmax(-1)
    with llama_cpp.Model(file, length=64) as model:
        mine = torch.from_numpy(model.logits(ids.numpy())).double().log_softmax(-1)
    return (expected.exp() * (expected - mine)).sum(-1)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_llama_cpp_computes_the_same_logits(family, tmp_path):
    source = calm(tmp_path / "source", family)
    compress.export(source, tmp_path / "dense.gguf", to="gguf", type="F32", embeddings="F32")
    assert divergence(source, tmp_path / "dense.gguf").mean() <= 1e-6
    store = {"store": "compact"} if family == "gpt2" else {}
    compress.apply("cast", source, tmp_path / "int4", weights="int4", method="rtn", group_size=32, **store)
    compress.export(tmp_path / "int4", tmp_path / "int4.gguf", to="gguf", embeddings="F32")
    each = divergence(tmp_path / "int4", tmp_path / "int4.gguf")
    assert (each.median() if family in ROUTED else each.mean()) <= 2e-4


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_llama_cpp_computes_with_nvfp4(family, tmp_path):
    compress.apply("cast", calm(tmp_path / "source", family), tmp_path / "in", weights="nvfp4", method="rtn")
    compress.export(tmp_path / "in", tmp_path / "out.gguf", to="gguf", embeddings="F32")
    assert divergence(tmp_path / "in", tmp_path / "out.gguf").mean() <= 2e-4


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q4_K_S", "Q5_K_M"])
def test_mixtures_are_llama_cpp_s_own_bytes(kind, tmp_path, monkeypatch):
    import gguf

    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 9}
    monkeypatch.setitem(FAMILIES, "llama", wide)
    source = calm(tmp_path / "source", "llama")
    compress.export(source, tmp_path / "dense.gguf", to="gguf")
    compress.export(source, tmp_path / "ours.gguf", to="gguf", type=kind)
    llama_cpp.quantize(tmp_path / "dense.gguf", tmp_path / "theirs.gguf", kind)
    ours, theirs = (
        {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("ours", "theirs")
    )
    assert {name: type_ for name, (type_, _) in ours.items()} == {name: type_ for name, (type_, _) in theirs.items()}
    assert ours == theirs
