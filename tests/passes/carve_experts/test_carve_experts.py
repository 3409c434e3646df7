"""Experts carved out of dense MLPs: against the dense model with the same neurons left out, by stock transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.write import stored_form
from compress.data.batches import Batches
from compress.errors import PassError
from compress.models.loading import load_model
from compress.passes.carve_experts import convert
from tests import pico, processes
from tests.toolbox import apply, output_error, plan, write

IDS = torch.randint(0, 250, (24, 32), generator=torch.Generator().manual_seed(0))
#: 64 neurons are 16 shared ones and 6 experts of 8; a token uses 2 of these, or 32 neurons.
SIZES = {"experts": 6}
#: Name ▶ (family, changes of its config).
CASES = {
    "llama": ("llama", {}),
    "windows": ("mistral", {"sliding_window": 7, "tie_word_embeddings": True}),
    "biases": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
}


def carve(folder, work, details=None, **settings):
    settings = {"repair": "none", **SIZES, **settings}
    details = {} if details is None else details
    return apply(open_checkpoint(folder), "carve_experts", data=Batches(IDS), work=work, details=details, **settings)


def owners(original, out, path):
    """Number of the expert of each neuron of a block, -1 for shared ones, by looking for its row in the files."""
    rows = original.tensor(f"{path}mlp.gate_proj.weight").data
    found = torch.full((len(rows),), -2)
    for name in out.spec.tensors:
        if (name.startswith(f"{path}mlp.") and name.endswith("expert.gate_proj.weight")) or (
            name.startswith(f"{path}mlp.experts.") and name.endswith("gate_proj.weight")
        ):
            number = -1 if "shared" in name else int(name.split(".experts.")[1].split(".")[0])
            for row in out.tensor(name).data:
                (place,) = (rows == row).all(1).nonzero().flatten().tolist()
                assert found[place] == -2
                found[place] = number
    assert (found > -2).all()
    return found


def by_hand(folder, out, active, dense=()):
    """The dense model where each token has the shared neurons and those of its experts, by the router in the file and the
    formula of its softmax; and the experts that each token should have."""
    original, model, planned = open_checkpoint(folder), load_model(folder), {}
    for index, layer in enumerate(model.model.layers):
        if index in dense:
            continue
        path = f"model.layers.{index}."
        owner, router = owners(original, out, path), out.tensor(f"{path}mlp.gate.weight").data.double()

        def route(module, args, layer=layer, owner=owner, router=router, index=index):
            scores, best = (layer.mlp.seen.double() @ router.T).softmax(-1).topk(active, -1)
            planned[index] = best.flatten(0, -2).sort(-1).values
            used = torch.zeros(*best.shape[:-1], len(router) + 1).scatter_(
                -1, best, (active * scores / scores.sum(-1, keepdim=True)).float()
            )
            used[..., -1] = 1.0
            return (args[0] * used[..., owner],)

        layer.mlp.register_forward_pre_hook(lambda module, args: setattr(module, "seen", args[0]))
        layer.mlp.down_proj.register_forward_pre_hook(route)
    return model, planned


STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM
assert "compress" not in sys.modules
folder, out = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert type(model).__name__ == "Qwen2MoeForCausalLM"
chosen = {}
for i, layer in enumerate(model.model.layers):
    if hasattr(layer.mlp, "gate"):
        layer.mlp.gate.register_forward_hook(lambda m, a, o, i=i: chosen.update({i: o[2].sort(-1).values, **chosen}))
ids = (torch.arange(33) * 7 % 250)[None]
with torch.no_grad():
    logits = model(input_ids=ids).logits
    prompt = model(input_ids=ids[:, :13], use_cache=True)
    steps, cache = [prompt.logits], prompt.past_key_values
    for i in range(13, 33):
        steps.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again")(input_ids=ids).logits
torch.save((logits, torch.cat(steps, 1), again, chosen), out)
"""


def stock(folder: Path, tmp_path: Path):
    """Logits at once, by cached steps and after saving again; and the experts chosen, by a process without this package."""
    run = processes.run(STOCK, folder, tmp_path / "stock.pt", foreign=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return torch.load(tmp_path / "stock.pt")


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_all_experts_together_are_the_dense_model(case, tmp_path):
    family, changes = CASES[case]
    folder = pico.folder(family, **changes)
    out = write(carve(folder, tmp_path / "work", active="100%"), tmp_path / "out")
    once, steps, again, _ = stock(out.folder, tmp_path)
    expected = pico.logits(load_model(folder), 33)
    assert relative(once, expected) < 1e-3
    assert relative(steps, once) < 1e-5
    assert torch.equal(again, once)


@pytest.mark.parametrize("case", ["llama", pytest.param("biases", marks=pytest.mark.slow)])
def test_carved_model_is_the_dense_one_without_the_other_experts(case, tmp_path):
    family, changes = CASES[case]
    folder = pico.folder(family, **changes)
    out = write(carve(folder, tmp_path / "work", skip=["*.layers.2.mlp.*"]), tmp_path / "out")
    once, steps, _, chosen = stock(out.folder, tmp_path)
    model, planned = by_hand(folder, out, 2, dense=[2])
    expected = pico.logits(model, 33)
    same = torch.cat([(planned[i] == chosen[i]).all(-1) for i in (0, 1, 3)])
    assert float(same.double().mean()) >= 0.999
    assert relative(once, expected) < 1e-3
    assert relative(steps, once) < 1e-5
    assert relative(once, pico.logits(load_model(folder), 33)) > 0.05


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_plan_of_carving_is_exact_to_the_byte(dtype, tmp_path):
    """The router is float32 whatever the rest is; a later cast leaves it so."""
    checkpoint = open_checkpoint(pico.folder("llama", dtype=dtype))
    settings = {"repair": "least_squares", "skip": ["*.layers.0.mlp.*"], **SIZES}
    planned = plan(checkpoint, "carve_experts", **settings)
    assert planned.exact
    _, layout = stored_form(planned, "stock", 50_000, checkpoint.metadata)
    out = write(carve(checkpoint.folder, tmp_path / "work", **settings), tmp_path / "out", max_shard=50_000)
    assert {s.file: s.bytes for s in layout.shards} == {f: (out.folder / f).stat().st_size for f in out.files}
    assert dict(out.spec.tensors) == dict(planned.tensors)
    assert out.spec.structure.config == planned.structure.config
    assert out.spec.structure.config["mlp_only_layers"] == [0]
    assert {t.dtype for t in planned.stored() if t.name.endswith("mlp.gate.weight")} == {"F32"}
    cast = plan(out, "cast", weights="fp16")
    assert {t.dtype for t in cast.stored() if t.name.endswith("mlp.gate.weight")} == {"F32"}


@pytest.mark.slow
def test_repairs_lower_the_error(tmp_path):
    """Solving for the down projections helps each block, and tuning helps more, on samples that are not trained on."""
    folder, errors = pico.folder("llama"), {}
    for repair in ("none", "least_squares", "tune"):
        details: dict = {}
        out = write(
            carve(folder, tmp_path / repair / "work", details, repair=repair, tune_epochs=5), tmp_path / repair / "out"
        )
        errors[repair] = output_error(out.folder, folder, IDS[:8])
        counted = details["blocks"][0]["experts"]
        assert counted["tokens"] == IDS.numel()
        assert sum(counted["reached"].values()) == 2 * IDS.numel()
    assert errors["tune"] < errors["least_squares"] < errors["none"]


@pytest.mark.slow
def test_carving_resumes_between_blocks(tmp_path, monkeypatch):
    folder = pico.folder("llama")
    whole = write(carve(folder, tmp_path / "a", repair="tune", tune_epochs=2), tmp_path / "whole")
    real, calls = convert.carve_block, []

    def stops(block, options):
        calls.append(block.index)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(block, options)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "carve_block", stops)
        with pytest.raises(KeyboardInterrupt):
            carve(folder, tmp_path / "b", repair="tune", tune_epochs=2)
    resumed = write(carve(folder, tmp_path / "b", repair="tune", tune_epochs=2), tmp_path / "resumed")
    assert (whole.folder / "model.safetensors").read_bytes() == (resumed.folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_padding_does_not_change_what_is_carved(tmp_path):
    folder = pico.folder("llama")
    padded, mask = torch.cat([IDS, torch.full((24, 6), 7)], 1), torch.ones(24, 38).bool()
    mask[:, 32:] = False
    settings = {"repair": "least_squares", **SIZES}
    plain = carve(folder, tmp_path / "a", **settings)
    other = apply(open_checkpoint(folder), "carve_experts", data=Batches(padded, mask), work=tmp_path / "b", **settings)
    for name in plain.spec.tensors:
        torch.testing.assert_close(plain.tensor(name).data, other.tensor(name).data, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_later_passes_know_the_experts(tmp_path):
    """Experts are removed, and codes are given to all but the router."""
    out = write(carve(pico.folder("llama"), tmp_path / "work"), tmp_path / "out")
    fewer = apply(out, "prune_structured", data=Batches(IDS), work=tmp_path / "w", experts=2, compensation="none")
    config = fewer.spec.structure.config
    assert (config["num_experts"], config["num_experts_per_tok"]) == (4, 2)
    load_model(write(fewer, tmp_path / "fewer").folder)
    cast = plan(out, "cast", weights="int8", method="rtn")
    coded = {t.name for t in cast.stored() if t.quant_format is not None}
    assert "model.layers.0.mlp.experts.5.down_proj.weight" in coded
    assert not [name for name in coded if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))]


@pytest.mark.slow
def test_distilling_leaves_flat_routers_as_they_are(tmp_path):
    import compress

    out = write(carve(pico.folder("llama"), tmp_path / "work"), tmp_path / "out").folder
    trained = compress.apply(
        "distill", out, tmp_path / "trained", data=torch.randint(0, 250, (60, 32), generator=torch.Generator().manual_seed(1)),
        teacher=str(pico.folder("llama")), steps=12, batch_size=8, validation_samples=8, learning_rate=1e-3,
    )  # fmt: skip
    before, after = open_checkpoint(out), open_checkpoint(trained)
    same = {n for n in before.spec.tensors if torch.equal(before.tensor(n).data, after.tensor(n).data)}
    gates = {n for n in before.spec.tensors if n.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))}
    assert len(gates) == 8
    assert gates <= same
    parts = ("self_attn.q_proj", "mlp.shared_expert.up_proj")
    assert not same & {f"model.layers.{i}.{part}.weight" for i in range(4) for part in parts}


@pytest.mark.parametrize(
    ("family", "changes", "settings", "key", "message"),
    [
        ("mixtral", {}, {}, None, "it has experts already"),
        ("bert", {}, {}, None, "bert is not one of llama, mistral, ministral, qwen2"),
        ("t5", {}, {}, None, "several lists"),
        ("gpt2", {}, {}, None, "gpt2 is not one of"),
        ("qwen3", {}, {}, None, "qwen3 is not one of"),
        ("llama", {"attention_bias": True}, {}, None, "its `o_proj` has a bias"),
        ("llama", {"mlp_bias": True}, {}, None, "its `down_proj` has a bias"),
        ("llama", {}, {"experts": 32}, "experts", "32 experts of at least 8 neurons do not fit .*; set `experts: 6` or fewer"),
        ("llama", {}, {"active": "30%"}, "active", "are none of 6 experts of 8; set a smaller `shared` or more `experts`"),
        ("llama", {}, {"active": "99%"}, "active", "are all of 6 experts of 8; set a smaller `active`"),
        ("llama", {}, {"skip": ["*.mlp.*"]}, "skip", "no MLP is left to carve"),
        ("llama", {}, {"skip": ["*.layers.1.mlp.up_proj"]}, "skip", "is carved together with the rest of its MLP"),
        ("llama", {}, {"skip": ["*.layer.1.*"]}, "skip", "matches no module"),
    ],
)  # fmt: skip
def test_carving_refuses_what_it_cannot_do(family, changes, settings, key, message):
    with pytest.raises(PassError, match=message) as caught:
        plan(open_checkpoint(pico.folder(family, **changes)), "carve_experts", **{**SIZES, **settings})
    assert caught.value.key == key


def test_carving_refuses_pruned_weights(tmp_path):
    pruned = apply(open_checkpoint(pico.folder("llama")), "prune_unstructured", method="magnitude", sparsity=0.5)
    with pytest.raises(PassError, match="has weights removed; carve experts before pruning"):
        plan(pruned, "carve_experts", **SIZES)


@pytest.mark.parametrize(
    "wrong", [{"active": 0}, {"active": 1.5}, {"active": True}, {"shared": 1}, {"experts": 1}, {"expert": 4}]
)
def test_settings_of_carving_are_checked(wrong):
    from compress.passes.carve_experts.settings import CarveExpertsSettings

    with pytest.raises(ValueError, match=next(iter(wrong))):
        CarveExpertsSettings(**wrong)


def test_plan_notes_say_what_a_token_uses():
    from compress import passes

    instance = passes.get("carve_experts")
    notes = instance.plan_notes(open_checkpoint(pico.folder("llama")).spec, instance.settings(**SIZES))
    assert notes[0] == "a token uses 32 of the 64 neurons of an MLP (50%): 16 shared, and 2 of 6 experts of 8"
    assert json.dumps(notes)


@pytest.mark.slow
def test_report_of_a_run_has_the_errors_of_down_projections(texts, tmp_path):
    import compress

    train, _ = texts
    result = compress.run({
        "model": str(pico.folder("llama")),
        "output": str(tmp_path / "out"),
        "document_separator": "<|doc|>",
        "data": {"calibration": {"files": [str(train)], "samples": 4, "length": 32}},
        "passes": [{"carve_experts": {"active": "75%", "experts": 4, "repair": "least_squares"}}],
    })  # fmt: skip
    assert all(note.startswith(("opens on", "once exported")) for note in result.report["notes"])
    assert "`carve_experts`, by block" in (tmp_path / "out.run" / "report.md").read_text()
