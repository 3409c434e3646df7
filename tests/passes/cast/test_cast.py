from __future__ import annotations

import pytest
import torch

from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Derived, Value
from compress.errors import PassError
from tests import pico
from tests.toolbox import apply, plan, write


def test_cast_rounds_to_nearest_even(pico_llama):
    """1 + 2^-8 lies between two bfloat16 values, 1 and 1 + 2^-7: the even one is 1. 1 + 3 * 2^-8 rounds up to even."""
    base = open_checkpoint(pico_llama)
    tensor = base.spec.tensors["model.norm.weight"]
    wanted = torch.full(tensor.shape, 1 + 2**-8)
    wanted[1] = 1 + 3 * 2**-8
    changed = Derived(base, base.spec, lambda n: Value(wanted) if n == tensor.name else base.tensor(n))
    cast = apply(changed, "cast", weights="bf16").tensor(tensor.name).data
    assert cast.dtype == torch.bfloat16
    assert cast[0].item() == 1
    assert cast[1].item() == 1 + 2**-6


def test_cast_overrides_and_widest_dtype(pico_llama, tmp_path):
    out = write(
        apply(open_checkpoint(pico_llama), "cast", weights="bf16", overrides={"re:.*norm": "fp32"}), tmp_path / "out"
    )
    dtypes = {t.name: t.dtype for t in out.spec.stored()}
    assert {d for n, d in dtypes.items() if "norm" in n} == {"F32"}
    assert {d for n, d in dtypes.items() if "norm" not in n} == {"BF16"}
    assert out.spec.structure.config["dtype"] == "float32"
    mixed = apply(open_checkpoint(pico_llama), "cast", weights="bf16", overrides={"lm_head": "fp16"})
    assert mixed.spec.structure.config["dtype"] == "float32"  # neither half format holds the other


def test_cast_only_and_skip(pico_llama):
    checkpoint = open_checkpoint(pico_llama)
    spec = plan(checkpoint, "cast", weights="fp16", only=["model.layers.*"], skip=["re:.*[01].mlp.*"])
    narrow = {t.module for t in spec.stored() if t.dtype == "F16"}
    assert "model.layers.2.mlp.up_proj" in narrow
    assert "model.layers.1.self_attn.q_proj" in narrow
    assert not any(m.startswith(("model.layers.0.mlp", "model.layers.1.mlp")) for m in narrow)
    assert "lm_head" not in narrow
    with pytest.raises(PassError, match=r"`model.layer.*` matches no module; the nearest is `model.layers") as caught:
        plan(checkpoint, "cast", weights="fp16", skip=["model.layer.*"])
    assert caught.value.key == "skip"
    with pytest.raises(PassError, match=r"is not a regular expression"):
        plan(checkpoint, "cast", weights="fp16", only=["re:("])
    for pattern in ("(" * 5000 + ")" * 5000, "a{99999999999999999999}"):
        with pytest.raises(PassError, match=r"is not a regular expression"):
            plan(checkpoint, "cast", weights="fp16", skip=[f"re:{pattern}"])


def test_cast_to_fp16_refuses_values_that_do_not_fit(pico_llama, tmp_path):
    base = open_checkpoint(pico_llama)
    name = "model.layers.1.mlp.up_proj.weight"

    def large(key: str) -> Value:
        value = base.tensor(key)
        if key == name:
            value.data[0, :3] = 7e4
        return value

    with pytest.raises(PassError, match=rf"3 weights of {name} are beyond the range of fp16"):
        write(apply(Derived(base, base.spec, large), "cast", weights="fp16"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_cast_refuses_when_nothing_changes(pico_llama):
    checkpoint = open_checkpoint(pico_llama)
    with pytest.raises(PassError, match=r"every weight is fp32 already"):
        plan(checkpoint, "cast", weights="fp32")
    assert plan(checkpoint, "cast", weights="fp32", allow_noop=True).tensors == checkpoint.spec.tensors


def test_cast_keeps_mask_of_weights_that_underflow(pico_llama, tmp_path):
    base = open_checkpoint(pico_llama)
    name = "model.layers.1.mlp.up_proj.weight"
    tiny = Derived(base, base.spec, lambda n: Value(base.tensor(n).data * 1e-12) if n == name else base.tensor(n))
    out = write(
        apply(apply(tiny, "prune_unstructured", method="magnitude", sparsity=0.5), "cast", weights="fp16"),
        tmp_path / "out",
    )
    value = out.tensor(name)
    assert value.data.abs().max() == 0
    assert int(value.mask.sum()) == value.mask.numel() // 2


def test_cast_keeps_ties(tmp_path):
    checkpoint = open_checkpoint(pico.save(tmp_path / "in", tie_word_embeddings=True))
    spec = plan(checkpoint, "cast", weights="bf16")
    assert spec.tensors["lm_head.weight"].dtype == "BF16"
