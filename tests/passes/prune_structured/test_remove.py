"""A pruned model equals the original with those units zeroed: every family, every kind of removal, loaded by stock transformers.

The twin is made without the pass's own knowledge of where units lie: which columns of the matrices that read the units are left
is seen by comparing values, and the others are set to zero in the original.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress import architectures
from compress.api import unpack
from compress.checkpoint.open import Stored, open_checkpoint
from compress.checkpoint.values import Checkpoint, Derived, Value
from compress.checkpoint.write import write_checkpoint
from compress.data.batches import Batches
from compress.errors import CheckpointError, PassError
from compress.models.loading import load_model
from tests import pico, processes
from tests.toolbox import apply, plan, write

DATA_FREE = {"importance": "magnitude", "compensation": "none"}
MLP_OUT = (
    "down_proj",
    "mlp.c_proj",
    "dense_4h_to_h",
    "fc2",
    "w2",
    "lin2",
    "output.dense",
    "ffn_output",
    "DenseReluDense.wo",
)
HEADS_OUT = ("o_proj", "attn.c_proj", "attention.dense", "out_proj", "attention.output.dense", "out_lin", "Attention.o")
NO_MLP_FIELD = ("bloom",)
#: Families whose heads share a latent, so that none goes by itself.
LATENT = ("minicpm3", "deepseek_v3")
#: Families whose config takes the hidden size for heads x head width.
FIXED_HEADS = ("gpt2", "bloom", "gpt_neox", "opt", "albert", "bert", "roberta", "electra", "distilbert")
#: Families whose records say how hidden channels are removed: all norms are RMSNorm.
RMS = tuple(
    record.model_type for record in architectures.RECORDS if record.hidden and record.model_type in pico.FAMILIES
)
MOE = ("mixtral", "qwen3_moe", "qwen2_moe")
#: Families that stock transformers reads in `make test`.
STOCK = ["llama", "phi3", "gpt2", "bert", "t5"]
#: Family, whether its embeddings are tied: those that lose hidden channels in `make test`.
HIDDEN = {("llama", False), ("phi3", False), ("gemma3_text", True), ("qwen3_moe", True)}


def reads(name: str, ends: tuple[str, ...]) -> bool:
    module = name.removesuffix(".weight")
    if ends is MLP_OUT and module.endswith("attention.output.dense"):
        return False
    return name.endswith(".weight") and module.endswith(ends)


def columns(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Inputs along the last axis."""
    data = checkpoint.tensor(name).data
    return data.T if checkpoint.spec.structure.model_type == "gpt2" else data


def zeroed(original: Stored, pruned: Stored, ends: tuple[str, ...], folder: Path) -> tuple[Stored, int]:
    """The original, columns that the pruned one lacks set to zero; and how many there are."""
    gone: dict[str, torch.Tensor] = {}
    for name in original.spec.tensors:
        if reads(name, ends):
            before, after = columns(original, name), columns(pruned, name)
            found = (before.T[:, None] == after.T[None]).all(-1)
            assert found.sum() == after.shape[1]
            gone[name] = ~found.any(1)

    def read(name: str) -> Value:
        data = original.tensor(name).data.clone()
        if name in gone:
            (data.T if original.spec.structure.model_type == "gpt2" else data)[:, gone[name]] = 0
        return Value(data)

    assert gone
    return write(Derived(original, original.spec, read), folder), sum(int(g.sum()) for g in gone.values())


def check(original: Stored, ends: tuple[str, ...], tmp_path: Path, **settings) -> Stored:
    pruned = write(apply(original, "prune_structured", **DATA_FREE, **settings), tmp_path / "out")
    twin, count = zeroed(original, pruned, ends, tmp_path / "twin")
    assert count
    expected, found = pico.logits(load_model(twin.folder)), pico.logits(load_model(pruned.folder))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, pico.logits(load_model(original.folder)), atol=1e-2)
    return pruned


@pytest.mark.parametrize(
    "family",
    pico.families((f for f in pico.FAMILIES if f not in NO_MLP_FIELD), tier=("phi3", "gpt2", "qwen3_moe", "t5", "vit")),
)
def test_remove_neurons_matches_zeroed_twin(family, folders, tmp_path):
    original = open_checkpoint(folders[family])
    pruned = check(original, MLP_OUT, tmp_path, mlp="25%")
    assert plan(original, "prune_structured", mlp="25%", **DATA_FREE).tensors == pruned.spec.tensors
    assert 0.6 < pruned.spec.parameters / original.spec.parameters < 1


UNEVEN = ("llama", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "bert", "roberta", "distilbert")
UNEVEN_SETTINGS = {"mlp": "40%", "allocation": "kl"}
UNREPAIRED = {**UNEVEN_SETTINGS, "importance": "activation", "compensation": "none"}
STOCK_UNEVEN = """
import sys, torch, transformers
for folder in sys.argv[1:]:
    auto = transformers.AutoModelForMaskedLM if "bert" in folder else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True, trust_remote_code=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not any(m == "compress" or m.startswith("compress.") for m in sys.modules)
    with torch.no_grad():
        torch.save(model.eval()(torch.arange(20)[None] + 5).logits.float(), f"{folder}/logits.pt")
"""


@pytest.fixture(scope="module")
def data():
    return Batches(torch.randint(5, 250, (24, 16), generator=torch.Generator().manual_seed(0)))


@pytest.mark.slow
@pytest.mark.parametrize("family", pico.families(UNEVEN, tier=("llama", "phi3", "gpt2", "bert")))
def test_remove_neurons_of_uneven_widths_matches_zeroed_twin(family, folders, data, tmp_path):
    """Blocks lose different numbers, in all as many as asked; loaded by transformers alone, and here, it is the twin."""
    original, details = open_checkpoint(folders[family]), {}
    settings = {"importance": "activation", "compensation": "none", **UNEVEN_SETTINGS}
    derived = apply(original, "prune_structured", data=data, work=tmp_path / "work", details=details, **settings)
    pruned = open_checkpoint(write_checkpoint(derived, tmp_path / family, store="compact").folder)
    widths = [columns(pruned, name).shape[1] for name in pruned.spec.tensors if reads(name, MLP_OUT)]
    before = [columns(original, name).shape[1] for name in original.spec.tensors if reads(name, MLP_OUT)]
    assert len(set(widths)) > 1
    assert [row["removed"] for row in details["widths"]["blocks"]] == [
        b - w for b, w in zip(before, widths, strict=True)
    ]
    assert sum(widths) == sum(round(0.6 * b) for b in before)
    assert plan(original, "prune_structured", **settings).parameters == pruned.spec.parameters
    twin, _ = zeroed(original, pruned, MLP_OUT, tmp_path / "twin")
    expected = load_model(twin.folder)(torch.arange(20)[None] + 5).logits.detach()
    found = load_model(pruned.folder)(torch.arange(20)[None] + 5).logits.detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    processes.run(STOCK_UNEVEN, pruned.folder, foreign=True).check_returncode()
    torch.testing.assert_close(torch.load(pruned.folder / "logits.pt"), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def uneven(folders, data, tmp_path):
    """A compact checkpoint whose blocks have widths of their own, and these."""
    settings = {**UNREPAIRED, "multiple_of": 4}
    derived = apply(
        open_checkpoint(folders["llama"]), "prune_structured", data=data, work=tmp_path / "work", **settings
    )
    pruned = open_checkpoint(write_checkpoint(derived, tmp_path / "uneven", store="compact").folder)
    return pruned, [pruned.spec.tensors[f"model.layers.{i}.mlp.down_proj.weight"].shape[1] for i in range(4)]


def test_uneven_widths_are_refused_when_others_need_even_ones(uneven, folders, data, tmp_path):
    """`unpack`, stock files, `share` and a second round do not take them, and say why."""
    pruned, widths = uneven
    folder = pruned.folder
    assert len(set(widths)) > 1
    assert not any(width % 4 for width in widths)
    with pytest.raises(PassError, match=r"no stock class can express that .*mlp.* has a width of its own"):
        unpack(folder, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    with pytest.raises(ValueError, match="has its own width, which no stock class can express"):
        load_model(folder).save_pretrained(tmp_path / "saved")
    with pytest.raises(PassError, match=r"cannot change this checkpoint: .* has a width of its own"):
        compress.apply("prune_structured", folder, tmp_path / "again", mlp=1, **DATA_FREE)
    with pytest.raises(PassError, match="has a width of its own"):
        compress.apply("share", folder, tmp_path / "shared", store="compact", groups=2, data=data.values["input_ids"])
    with pytest.raises(PassError, match=r"stock classes cannot express .* own"):
        compress.apply(
            "prune_structured", folders["llama"], tmp_path / "s", data=data.values["input_ids"], **UNREPAIRED
        )
    config = json.loads((folder / "config.json").read_text())
    config["edits"][0]["values"]["outputs"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config and weights disagree"):
        open_checkpoint(folder)


@pytest.mark.slow
def test_uneven_widths_are_taken_by_later_passes(uneven, folders, data, tmp_path):
    pruned, widths = uneven
    for name, settings in (("prune_unstructured", {"sparsity": 0.5}), ("cast", {"weights": "int4", "group_size": 4})):
        later = apply(pruned, name, data=data.first(4), work=tmp_path / name, effort="fast", **settings)
        written = write_checkpoint(later, tmp_path / f"out_{name}", store="compact")
        assert torch.isfinite(load_model(written.folder)(data.values["input_ids"]).logits).all()
    student = {"student": {"layers": 2, "from": "last"}, "steps": 1, "batch_size": 4, "validation_samples": 4}
    ids = {"data": data.values["input_ids"], "teacher": str(folders["llama"])}
    compress.apply("distill", pruned.folder, tmp_path / "student", store="compact", **student, **ids)
    cut = open_checkpoint(tmp_path / "student").spec
    assert [cut.tensors[f"model.layers.{i}.mlp.down_proj.weight"].shape[1] for i in range(2)] == widths[2:]


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("mixtral", {}, "`allocation: kl` does not reach .*: experts are fused in memory"),
        ("llama", {"importance": "magnitude"}, "`allocation: kl` tries widths on calibration data"),
        ("llama", {"mlp": None, "heads": 2}, "`allocation: kl` goes with `mlp`"),
    ],
)
def test_uneven_widths_are_refused_in_stock_store(family, settings, message, folders):
    given = {k: v for k, v in {**UNEVEN_SETTINGS, **settings}.items() if v is not None}
    with pytest.raises((PassError, ValueError), match=message):
        plan(open_checkpoint(folders[family]), "prune_structured", **given)


@pytest.mark.parametrize(
    "family",
    pico.families((f for f in pico.FAMILIES if f not in (*FIXED_HEADS, *LATENT)), tier=("llama", "phi3", "t5")),
)
@pytest.mark.parametrize("count", [1, 2])
def test_remove_heads_matches_zeroed_twin(family, count, folders, tmp_path):
    """Two of four heads: one from each group of two, or both of one where each has its own keys; one goes where it is a group."""
    original = open_checkpoint(folders[family])
    groups = original.spec.structure.config.get("num_key_value_heads", 4)
    heads_key = architectures.of(original.spec.structure.config).heads_key
    if count % groups and count % (4 // groups):
        with pytest.raises(
            PassError, match="1 heads are neither the same number from each of 2 groups, nor whole groups of 2"
        ):
            plan(original, "prune_structured", heads=count, **DATA_FREE)
        return
    if family == "gemma3_text" and count == 1:  # 3 heads do not divide a hidden size of 32
        with pytest.raises(PassError, match="wants a number of heads that divides the hidden size 32, and 3 does not"):
            plan(original, "prune_structured", heads=count, **DATA_FREE)
        return
    pruned = check(original, HEADS_OUT, tmp_path, heads=count)
    assert pruned.spec.structure.config[heads_key] == 4 - count
    assert plan(original, "prune_structured", heads=count, **DATA_FREE).tensors == pruned.spec.tensors


@pytest.mark.parametrize("family", pico.families((f for f in RMS if f != "gemma3_text"), tier=("phi3",)))
def test_remove_whole_groups_of_heads_matches_zeroed_twin(family, tmp_path):
    """Half of four heads in four groups of one: groups go, with their keys and values."""
    original = open_checkpoint(pico.save(tmp_path / "in", family, with_tokenizer=False, num_key_value_heads=4))
    pruned = check(original, HEADS_OUT, tmp_path, heads=2)
    config = pruned.spec.structure.config
    assert config["num_attention_heads"] == config["num_key_value_heads"] == 2


@pytest.mark.parametrize("family", LATENT)
def test_remove_heads_refuses_latent_attention(family, folders):
    with pytest.raises(PassError, match=f"the record of {family} names no attention"):
        plan(open_checkpoint(folders[family]), "prune_structured", heads=1, **DATA_FREE)


@pytest.mark.parametrize("family", FIXED_HEADS)
def test_remove_heads_refuses_counts_without_a_stock_config(family, folders):
    with pytest.raises(
        PassError, match="cannot have fewer heads: its config takes the hidden size for heads x head width"
    ):
        plan(open_checkpoint(folders[family]), "prune_structured", heads=1, **DATA_FREE)


def test_remove_kv_heads_takes_their_queries_along(tmp_path):
    """One of two KV heads goes with both of its query heads, where `heads: 2` takes one from each group."""
    original = open_checkpoint(pico.folder("llama"))
    pruned = check(original, HEADS_OUT, tmp_path, kv_heads=1)
    config = pruned.spec.structure.config
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    assert plan(original, "prune_structured", kv_heads="50%", **DATA_FREE).tensors == pruned.spec.tensors
    with pytest.raises(PassError, match="cannot remove 2 of 2 KV heads; at most 1 can go"):
        plan(original, "prune_structured", kv_heads=2, **DATA_FREE)


def test_remove_heads_turns_llama_of_three_heads_into_mistral(tmp_path):
    original = open_checkpoint(pico.save(tmp_path / "in", "llama", num_key_value_heads=4))
    pruned = check(original, HEADS_OUT, tmp_path, heads=1)
    config = pruned.spec.structure.config
    assert (config["model_type"], config["architectures"], config["sliding_window"]) == (
        "mistral",
        ["MistralForCausalLM"],
        None,
    )
    import transformers

    text = "The hour is late."
    before, after = (
        transformers.AutoTokenizer.from_pretrained(f)(text).input_ids for f in (original.folder, pruned.folder)
    )
    assert before == after


@pytest.mark.parametrize("groups", [2, 4])
def test_remove_heads_takes_their_logits_along(groups, tmp_path):
    """GraniteSWA has a logit per head; of 4 heads one in each of 2 groups goes, or 2 groups of one."""
    original = open_checkpoint(pico.folder("granite_swa", head_dim=8, num_key_value_heads=groups))
    pruned = check(original, HEADS_OUT, tmp_path, heads=2)
    assert pruned.spec.tensors["model.layers.0.self_attn.sinks"].shape == (2,)


@pytest.mark.parametrize("settings", [{"heads": 2}, {"kv_heads": 1}, {"keep_kv_heads": 1}])
def test_remove_heads_refuses_norms_over_all_heads(settings):
    with pytest.raises(PassError, match="normalises the queries and keys of all heads together"):
        plan(open_checkpoint(pico.folder("olmo3")), "prune_structured", **settings, **DATA_FREE)


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        *(
            pytest.param(*case, marks=[] if case in HIDDEN else [pytest.mark.slow])
            for case in product(RMS, (False, True))
        ),
        ("granite_swa", True),
    ],
)
def test_remove_hidden_channels_matches_reference(family, tied, tmp_path):
    original = open_checkpoint(pico.save(tmp_path / "in", family, with_tokenizer=False, tie_word_embeddings=tied))
    pruned = write(apply(original, "prune_structured", hidden=8, **DATA_FREE), tmp_path / "out")
    name = "model.embed_tokens.weight"
    before, after = (torch.nn.functional.normalize(c.tensor(name).data, dim=0) for c in (original, pruned))
    found = ((before.T[:, None] - after.T[None]).abs().amax(-1) < 1e-5).any(1)
    assert found.sum() == 24

    def read(name: str) -> Value:
        data = original.tensor(name).data.clone()
        if name == "model.embed_tokens.weight":
            data[:, ~found] = 0
        if reads(name, MLP_OUT) or reads(name, HEADS_OUT):
            data[~found] = 0
        return Value(data)

    twin = write(Derived(original, original.spec, read), tmp_path / "twin")
    expected, logits = pico.logits(load_model(twin.folder)), pico.logits(load_model(pruned.folder))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert plan(original, "prune_structured", hidden=8, **DATA_FREE).tensors == pruned.spec.tensors


@pytest.mark.parametrize("family", [f for f in pico.FAMILIES if f not in RMS])
def test_remove_hidden_channels_refuses_other_families(family, folders):
    with pytest.raises(PassError, match="cannot lose hidden width exactly"):
        plan(open_checkpoint(folders[family]), "prune_structured", hidden=8, **DATA_FREE)


@pytest.mark.parametrize("family", pico.families(MOE, tier=("qwen2_moe",)))
def test_remove_experts_matches_masked_router(family, folders, tmp_path, monkeypatch):
    """Equal to the original with the logits of those experts at minus infinity."""
    from compress.data.batches import Batches

    original = open_checkpoint(folders[family])
    details: dict = {}
    ids = torch.randint(0, 250, (8, 16), generator=torch.Generator().manual_seed(0))
    smaller = apply(
        original,
        "prune_structured",
        data=Batches(ids),
        work=tmp_path / "work",
        details=details,
        experts=1,
        compensation="none",
    )
    pruned = write(smaller, tmp_path / "out")
    model = load_model(original.folder)
    gone = {}
    for index, kept in details["kept_experts"].items():
        lost = [e for e in range(4) if e not in kept]
        assert len(lost) == 1
        assert details["expert_saliency"][index][lost[0]] == min(details["expert_saliency"][index])
        gone[id(model.model.layers[int(index)].mlp.gate.weight)] = lost
    linear = torch.nn.functional.linear

    def barred(x, weight, bias=None):
        result = linear(x, weight, bias)
        if id(weight) in gone:
            result[..., gone[id(weight)]] = -torch.inf
        return result

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", barred)
        expected = pico.logits(model)
    torch.testing.assert_close(pico.logits(load_model(pruned.folder)), expected, rtol=1e-4, atol=1e-4)
    assert plan(original, "prune_structured", experts=1, compensation="none").tensors == pruned.spec.tensors


SCRIPT = """
import json, sys, torch, transformers
assert "compress" not in sys.modules
for folder, architecture in json.loads(sys.argv[1]):
    model, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
    inputs, expected = torch.load(folder + "/expected.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
    print(folder)
"""


@pytest.mark.parametrize(
    "families",
    [
        STOCK,
        pytest.param([family for family in pico.FAMILIES if family not in STOCK], marks=pytest.mark.slow),
    ],
    ids=["a few", "others"],
)
def test_removed_units_load_in_stock(families, folders, tmp_path):
    """All families in one process that cannot import this package."""
    made = []
    for family in families:
        original = open_checkpoint(folders[family])
        settings: dict = {"layers": [1]} if family in pico.ONE_LIST else {}
        if family not in NO_MLP_FIELD:
            settings["mlp"] = "50%"
        if family not in (*FIXED_HEADS, *LATENT):
            settings["heads"] = 2
        out = write(apply(original, "prune_structured", **DATA_FREE, **settings), tmp_path / family)
        model = load_model(out.folder)
        pico.save_expected(model, out.folder / "expected.pt")
        made.append((str(out.folder), out.spec.structure.class_name))
    run = processes.run(SCRIPT, json.dumps(made), foreign=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(run.stdout.split()) == len(families)


def test_remove_cuts_masks(folders, tmp_path):
    original = open_checkpoint(folders["llama"])
    sparse = write(apply(original, "prune_unstructured", method="magnitude", sparsity=0.5), tmp_path / "sparse")
    planned = plan(sparse, "prune_structured", mlp="25%", **DATA_FREE)
    assert not planned.exact
    pruned = write(apply(sparse, "prune_structured", mlp="25%", **DATA_FREE), tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.weight"
    value = pruned.tensor(name)
    assert value.mask is not None
    assert value.data.shape == (32, 48)
    assert torch.equal(value.mask, value.data != 0)
    assert pruned.spec.tensors[name].kept == int(value.mask.sum())


def test_remove_only_slices_values(folders, tmp_path):
    """Nothing but selection happens to the weights of what stays."""
    original = load_file(folders["phi3"] / "model.safetensors")
    out = write(apply(open_checkpoint(folders["phi3"]), "prune_structured", mlp=16, **DATA_FREE), tmp_path / "out")
    pruned = load_file(out.folder / "model.safetensors")
    name = "model.layers.2.mlp.gate_up_proj.weight"
    rows = [(original[name] == row).all(1).nonzero().item() for row in pruned[name]]
    assert len(rows) == 96
    assert [r + 64 for r in rows[:48]] == rows[48:]  # gate and up lose the same neurons
