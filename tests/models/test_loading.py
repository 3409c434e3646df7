"""Models of damaged checkpoints are refused in one line, before memory is taken."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.checkpoint.open import open_checkpoint
from compress.errors import CheckpointError, DataError
from compress.models.loading import check_keys, load_checkpoint, load_for_samples, load_model
from tests import pico
from tests.toolbox import edit_config

WEIGHTS = "model.safetensors"


def test_load_model_refuses_unknown_model_type(folder):
    edit_config(folder, model_type="unheard_of")
    with pytest.raises(CheckpointError, match=r"the model type `unheard_of` is unknown to transformers"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 72}, "config and weights disagree"),
        (
            {"attention_bias": True},
            r"16 weights are missing for LlamaForCausalLM, such as model.layers.0.self_attn.k_proj.bias",
        ),
        ({"architectures": ["Nonsense"]}, "has no model class Nonsense"),
        ({"rms_norm_eps": "small"}, "config.json cannot be used"),
    ],
)
def test_check_keys_refuses_weights_that_disagree_with_stock_class(changes, message, folder):
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        check_keys(open_checkpoint(folder))
    assert "\n" not in str(caught.value)


def test_check_keys_names_missing_and_unknown_tensors(folder):
    tensors = load_file(folder / WEIGHTS)
    removed = {k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.weight"}
    save_file(removed, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing .* model.layers.1.mlp.up_proj.weight"):
        check_keys(open_checkpoint(folder))
    save_file({**tensors, "surprise": torch.ones(2)}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are unknown to the model .* surprise"):
        check_keys(open_checkpoint(folder))


def test_load_model_never_runs_the_bundled_file(folder, tmp_path):
    from tests.toolbox import apply, write

    out = write(
        apply(open_checkpoint(folder), "prune_unstructured", method="magnitude", sparsity=0.6),
        tmp_path / "out",
        store="compact",
    )
    expected = pico.logits(load_model(out.folder))
    (out.folder / "modeling_compress.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit('ran')\n")
    assert torch.equal(pico.logits(load_model(out.folder)), expected)
    assert not (tmp_path / "ran").exists()


def refused(work: Callable[[], object]) -> str | None:
    """The message where a checkpoint is refused; whatever else is raised fails the test."""
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def olmo(tmp_path_factory):
    """A family without a record here."""
    folder = tmp_path_factory.mktemp("olmo")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = transformers.Olmo2Config(vocab_size=50, pad_token_id=0, bos_token_id=0, eos_token_id=0, **sizes)
    transformers.Olmo2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_load_model_checks_sizes_of_families_without_a_record(olmo, tmp_path):
    assert load_model(olmo).num_parameters() == open_checkpoint(olmo).spec.parameters
    shutil.copytree(olmo, tmp_path / "model")
    edit_config(tmp_path / "model", num_hidden_layers=10**7)
    with pytest.raises(CheckpointError, match="`num_hidden_layers` is 10000000, but the files have 25 tensors"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("size", [10**10, 10**18])
def test_load_model_compares_shapes_before_it_allocates(olmo, size, tmp_path):
    shutil.copytree(olmo, tmp_path / "model")
    edit_config(tmp_path / "model", intermediate_size=size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="config"):
        load_model(tmp_path / "model")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "nonsense"}, {"hidden_act": [1]}, {"layer_types": ["x"]}, {"rope_parameters": {"rope_type": "nonsense"}}, {"hidden_size": 33},
        {"num_key_value_heads": 3}, {"attention_bias": "x"}, {"rms_norm_eps": "x"}, {"initializer_range": []}, {"pad_token_id": 10**6}, {"dtype": "nonsense"},
        {"_attn_implementation": "nonsense"}, {"architectures": ["set_seed"]}, {"architectures": ["__version__"]},
    ],
    ids=str,
)  # fmt: skip
def test_check_keys_reports_class_errors_as_bad_config(changes, folder):
    edit_config(folder, **changes)
    error = refused(lambda: check_keys(open_checkpoint(folder))) or refused(lambda: load_model(folder))
    assert "\n" not in (error or "")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"temperature": "x", "do_sample": true}', "[" * 20000 + "]" * 20000, '{"max_length": [1]}']
)
def test_check_keys_refuses_damaged_generation_config(text, folder):
    edit_config(folder)
    (folder / "generation_config.json").write_text(text)
    error = refused(lambda: check_keys(open_checkpoint(folder)))
    assert text.startswith('{"') if error is None else "generation_config.json: cannot be used: " in error


def test_load_model_prints_no_warnings_of_transformers(tmp_path, recwarn):
    """A BERT has no `rope_scaling`, and it says so by a warning of Python."""
    shutil.copytree(pico.folder("bert"), tmp_path / "model")
    edit_config(tmp_path / "model", rope_scaling={"rope_type": "linear", "factor": 2.0})
    load_model(tmp_path / "model")
    assert not [str(w.message) for w in recwarn.list if "transformers" in str(w.filename)]


def test_load_model_takes_a_model_that_fits(olmo):
    """The bounds are of counts of modules alone: large vocabularies, positions and rotary bases are none."""
    config = {
        "vocab_size": 50,
        "max_position_embeddings": 10**6,
        "rope_theta": 10**7,
        "sliding_window": 10**5,
        "max_window_layers": 500,
    }
    edited = olmo.with_name("edited")
    shutil.copytree(olmo, edited)
    edit_config(edited, **config)
    assert torch.equal(load_model(edited).lm_head.weight, load_model(olmo).lm_head.weight)


def test_load_model_refuses_half_a_pooler(tmp_path):
    model = transformers.BertModel(pico.config("bert"))
    state = {k: v for k, v in model.state_dict().items() if k != "pooler.dense.bias"}
    model.save_pretrained(tmp_path / "in", state_dict=state)
    with pytest.raises(CheckpointError, match=r"weights are missing for BertModel, such as pooler.dense.bias"):
        load_model(tmp_path / "in")


def test_load_model_takes_the_usual_base_class(tmp_path):
    config = transformers.FunnelConfig(vocab_size=99, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8, d_inner=32)
    transformers.FunnelModel(config).save_pretrained(tmp_path / "in")
    said = json.loads((tmp_path / "in/config.json").read_text())
    del said["architectures"]
    (tmp_path / "in/config.json").write_text(json.dumps(said))
    assert type(load_model(tmp_path / "in")) is transformers.FunnelModel


def test_load_model_takes_infinite_numbers_as_transformers_writes_them(tmp_path):
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "in")
    edit_config(tmp_path / "in", time_step_limit=[0.0, {"__float__": "Infinity"}])
    assert load_model(tmp_path / "in").config.time_step_limit[1] == float("inf")


def test_classifiers_without_padding_token_read_several_unpadded_texts(tmp_path):
    pico.save(tmp_path / "in", "llama", class_name="LlamaForSequenceClassification", pad_token_id=None)
    stored = open_checkpoint(tmp_path / "in")
    ids = torch.randint(250, (3, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = load_checkpoint(stored)
        each = torch.cat([stock(input_ids=row[None]).logits for row in ids])
        model = load_for_samples(stored)
        torch.testing.assert_close(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, each)
        with pytest.raises(DataError, match="set pad_token_id"):
            model(input_ids=ids, attention_mask=torch.tensor([[1] * 8, [1] * 8, [1] * 7 + [0]]))
