"""Every pass that computes on a GPU does what it does on the CPU, and ends with the same bytes after it was stopped."""

from __future__ import annotations

import pytest
import torch

import compress
from compress.checkpoint.open import open_checkpoint
from tests import pico
from tests.training.test_states_in_runs import Stop, StopsAt

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

IDS = torch.randint(2, 250, (16, 24), generator=torch.Generator().manual_seed(0))
#: Name ▶ (family, pass, settings).
CASES = {
    "int4": ("llama", "cast", {"weights": "int4", "group_size": 32}),
    "int4, gptq": ("gpt2", "cast", {"weights": "int4", "group_size": 32, "error_correction": [], "reconstruction_epochs": 0}),
    "int4, experts": ("qwen3_moe", "cast", {"weights": "int4", "group_size": 32}),
    "int4, encoder": ("bert", "cast", {"weights": "int4", "group_size": 32}),
    "int4, two lists": ("t5", "cast", {"weights": "int4", "group_size": 32, "reconstruction_epochs": 0}),
    "bits": ("llama", "cast", {"bits": 5, "group_size": 32, "reconstruction_epochs": 0}),
    "fp8": ("llama", "cast", {"weights": "fp8"}),
    "activations": ("llama", "cast", {"weights": "int8", "activations": "int8"}),
    "kv cache": ("llama", "cast", {"weights": "int8", "kv_cache": "fp8"}),
    "wanda": ("llama", "prune_unstructured", {"method": "wanda", "sparsity": 0.5}),
    "sparsegpt": ("llama", "prune_unstructured", {"method": "sparsegpt", "pattern": "2:4"}),
    "alps": ("llama", "prune_unstructured", {"method": "alps", "sparsity": 0.5}),
    "alps, experts": ("mixtral", "prune_unstructured", {"method": "alps", "sparsity": 0.5, "reconstruction_epochs": 0}),
    "owl": ("llama", "prune_unstructured", {"method": "wanda", "sparsity": 0.5, "allocation": "owl"}),
    "by loss": ("llama", "prune_unstructured", {"method": "wanda", "sparsity": 0.5, "allocation": "kl"}),
    "mlp": ("llama", "prune_structured", {"mlp": 0.25}),
    "heads": ("llama", "prune_structured", {"keep_kv_heads": 1}),
    "hidden": ("llama", "prune_structured", {"hidden": 0.25}),
    "experts": ("qwen3_moe", "prune_structured", {"experts": 2}),
    "taylor": ("llama", "prune_structured", {"mlp": 0.25, "importance": "taylor"}),
    "layers": ("llama", "prune_structured", {"layers": 1}),
    "factorize": ("llama", "factorize", {"keep_parameters": 0.7}),
    "share": ("llama", "share", {"groups": 2, "residual_rank": 4}),
    "codebook": ("llama", "share", {"codebook_bits": 4}),
    "latent": ("llama", "latent_attention", {"max_cache": 0.75}),
    "windows": ("llama", "local_attention", {"window": 8, "full": 1}),
    "linformer": ("bert", "low_rank_attention", {"rank": 8}),
    "carve": ("llama", "carve_experts", {"experts": 6}),
}  # fmt: skip

#: Of `distance`: sums in another order tip choices that are nearly even; a pass that did something else would be at about 1.
BOUND = 0.15


def applied(case, out, device, **more):
    """Tensors of the result, and the report's part."""
    family, name, settings = CASES[case]
    details = {}
    compress.apply(
        name, pico.folder(family), out, data=IDS, device=device, store="compact", details=details, **settings, **more
    )
    read = open_checkpoint(out)
    return {t.name: read.tensor(t.name).data for t in read.spec.stored()}, details


def distance(case, a, b):
    """Mean of |a - b| over that of |b|, over all float tensors."""
    assert a.keys() == b.keys(), case
    floats = [k for k in a if a[k].is_floating_point()]
    return float(sum((a[k].double() - b[k].double()).abs().sum() for k in floats)) / float(
        sum(b[k].double().abs().sum() for k in floats)
    )


@pytest.mark.parametrize("case", CASES)
def test_gpu_matches_cpu(case, tmp_path):
    here, _ = applied(case, tmp_path / "cpu", "cpu")
    there, _ = applied(case, tmp_path / "gpu", "cuda")
    assert distance(case, there, here) <= BOUND


def test_distillation_on_a_gpu_matches_that_on_the_cpu(tmp_path, pico_llama):
    """The held-out losses along the way, of a student of two blocks."""
    losses = []
    for device in ("cpu", "cuda"):
        details = {}
        compress.apply(
            "distill", pico_llama, tmp_path / device, data=IDS, device=device, student={"layers": 2}, teacher=str(pico_llama),
            steps=6, batch_size=4, validation_samples=4, evaluate_every=2, details=details, allow_noop=True,
        )  # fmt: skip
        losses.append([row["loss"] for row in details["training"]["held_out"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


#: Pass ▶ (settings, title of the task that stops, its step).
STOPPED = {
    "cast": ({"weights": "int4", "group_size": 32, "reconstruction_epochs": 1}, "casting by gptq", 3),
    "distill": ({"student": {"layers": 2}, "steps": 6, "batch_size": 4, "validation_samples": 4, "evaluate_every": 2}, "training", 5),
}  # fmt: skip


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_on_a_gpu_ends_with_the_same_bytes(name, tmp_path, pico_llama, texts):
    settings, title, step = STOPPED[name]
    text = {"files": [str(texts[0])], "length": 16}
    recipe = {
        "model": str(pico_llama), "device": "cuda", "document_separator": "<|doc|>",
        "data": {"calibration": {**text, "samples": 8}, "training": text}, "passes": [{name: settings}],
    }  # fmt: skip
    compress.run({**recipe, "output": str(tmp_path / "whole")})
    with pytest.raises(Stop):
        compress.run({**recipe, "output": str(tmp_path / "stopped")}, progress=StopsAt(step, title))
    compress.run({**recipe, "output": str(tmp_path / "stopped")})
    whole, stopped = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped
