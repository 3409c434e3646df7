"""The runner computes block by block what the model computes, for every family, and resumes to the same bytes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from compress import architectures
from compress.architectures.record import Architecture
from compress.blockwise.experts import Experts
from compress.blockwise.inputs import Inputs
from compress.blockwise.linears import find_linears
from compress.blockwise.results import TensorExtras
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Derived, Value
from compress.checkpoint.write import write_checkpoint
from compress.data.batches import Batches
from compress.errors import CheckpointError, PassError
from compress.models.blocks import find_blocks
from compress.models.loading import load_checkpoint, load_model
from compress.passes.blockwise import open_runner
from compress.progress import SilentProgress
from compress.workspace import Workspace
from tests import pico
from tests.toolbox import SAMPLES, inputs_of, matrices, runner_of


def linear_inputs(model, checkpoint, inputs, tensor):
    """What the module that owns ``tensor`` reads in a plain forward of the stock model, [tokens, inputs]."""
    seen = []
    handle = model.get_submodule(tensor.rpartition(".")[0]).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        model.base_model(**inputs.rows(range(inputs.samples)))
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


@pytest.mark.parametrize("family", pico.families(pico.ONE_LIST, tier=("llama", "gpt2", "qwen3_moe", "vit")))
def test_blocks_run_by_themselves_match_the_whole_model(family, folders, tmp_path):
    """Hidden states, statistics and names agree with a stock model that is loaded whole; what is not changed stays."""
    checkpoint = open_checkpoint(folders[family])
    model = load_checkpoint(checkpoint, dtype="float32")
    blocks = find_blocks(model, architectures.of(checkpoint.spec.structure.config))
    expected: dict[int, torch.Tensor] = {}
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda m, a, o, i=i: expected.__setitem__(i, o[0] if isinstance(o, tuple) else o))
    runner = runner_of(checkpoint, tmp_path, with_targets=True)
    grams, compared = {}, []

    def look(block):
        for group, statistics, _ in block.statistics(1):
            for linear in group:
                grams[linear.name] = statistics
                assert torch.equal(
                    linear.weight.T if linear.transposed else linear.weight, checkpoint.tensor(linear.name).data
                )
        rows = list(range(SAMPLES))
        output = block.forward(rows, block.inputs.read(rows))
        assert torch.equal(block.targets.read(rows), output)
        compared.append((block.index, output))
        return {}

    result = runner.run(look, "looking")
    with torch.no_grad():
        model.base_model(**runner.inputs.rows(range(SAMPLES)))
    for index, output in compared:
        assert (output - expected[index]).abs().max() <= 1e-5 * expected[index].abs().max(), index
    assert set(grams) == matrices(checkpoint)
    assert len(compared) == len(blocks)
    for name, statistics in grams.items():
        try:
            x = linear_inputs(model, checkpoint, runner.inputs, name).double()
        except AttributeError:
            continue  # an expert, which the stock model does not have as a module: see below
        assert statistics.tokens == len(x)
        assert torch.allclose(
            statistics.hessian.double(), x.T @ x, rtol=1e-4, atol=1e-5 * float((x.T @ x).diagonal().max())
        )
    read = result.reader()
    assert all(torch.equal(read(t.name).data, checkpoint.tensor(t.name).data) for t in checkpoint.spec.stored())


@pytest.mark.parametrize("family", [pytest.param("mixtral", marks=pytest.mark.slow), "qwen3_moe"])
def test_hessians_of_experts_sum_the_tokens_routed_to_them(family, folders, tmp_path):
    checkpoint = open_checkpoint(folders[family])
    model = load_checkpoint(checkpoint, dtype="float32")
    name, fused = next((n, m) for n, m in model.named_modules() if Experts.fits(m))
    calls = []
    fused.register_forward_pre_hook(lambda m, a: calls.append(a))
    runner = runner_of(checkpoint, tmp_path)
    with torch.no_grad():
        model.base_model(**runner.inputs.rows(range(SAMPLES)))
    hidden, index, _ = calls[0]
    found = {}

    def look(block):
        if f".{block.index}." in f"{name}.":
            for group, statistics, _ in block.statistics(1 << 30):
                found.update({linear.name: statistics for linear in group})
        return {}

    runner.run(look, "looking")
    seen = 0
    half = fused.down_proj.shape[2]
    for e in range(fused.down_proj.shape[0]):
        x = hidden[(index == e).any(-1)].double()
        gate, up = (x.float() @ fused.gate_up_proj[e].T).split(half, -1)
        middle = (fused.act_fn(gate) * up).detach().double()
        for tensor in found:
            if f"experts.{e}." not in tensor:
                continue
            wanted = (
                middle
                if checkpoint.spec.tensors[tensor].shape[1] == half and ("down" in tensor or "w2" in tensor)
                else x
            )
            assert found[tensor].tokens == len(x)
            assert torch.allclose(found[tensor].hessian.double(), wanted.T @ wanted, rtol=1e-3, atol=1e-4)
            seen += 1
    assert seen == 3 * fused.down_proj.shape[0]


def test_group_linears_finds_matrices_with_the_same_inputs(folders, tmp_path):
    checkpoint = open_checkpoint(folders["llama"])
    shapes = []

    def look(block):
        shapes.append([sorted(s.name.split(".")[-2] for s in group) for group in block.groups])
        return {}

    runner_of(checkpoint, tmp_path).run(look, "looking")
    assert shapes[0] == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("family", pico.families(["llama", "gemma3_text", "opt", "bert", "mixtral"], tier=("llama",)))
def test_hessians_leave_padding_out(family, folders, tmp_path):
    """Samples padded on the right give the statistics of the same samples without padding."""
    checkpoint = open_checkpoint(folders[family])
    short = inputs_of(checkpoint).values["input_ids"][:, :7]
    ids = torch.nn.functional.pad(short, (0, 5), value=9)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, :7] = True
    grams = []
    for number, inputs in enumerate((Inputs({"input_ids": short}), Inputs({"input_ids": ids}, mask))):
        found = {}

        def look(block, found=found):
            for group, statistics, _ in block.statistics(1 << 30):
                found[group[0].name] = statistics
            return {}

        runner_of(checkpoint, tmp_path / str(number), inputs).run(look, "looking")
        grams.append(found)
    for name, statistics in grams[0].items():
        other = grams[1][name]
        assert statistics.tokens == other.tokens
        assert torch.allclose(
            statistics.hessian, other.hessian, rtol=1e-3, atol=1e-3 * float(statistics.hessian.abs().max())
        )


def halve(block):
    """A change that shows: every matrix is halved but for what its mask removes."""
    masks = {}
    for linear in block.linears:
        mask = torch.zeros_like(linear.weight, dtype=torch.bool)
        mask[:, ::2] = True
        linear.weight.mul_(0.5).masked_fill_(~mask, 0)
        masks[linear.name] = TensorExtras(mask.T.contiguous() if linear.transposed else mask)
    return masks


@pytest.mark.parametrize("family", ["llama", "gpt2", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_run_passes_changes_to_the_next_block_and_the_file(family, folders, tmp_path):
    checkpoint = open_checkpoint(folders[family])
    result = runner_of(checkpoint, tmp_path / "work").run(halve, "halving")
    read = result.reader()
    names = matrices(checkpoint)
    axis = architectures.of(checkpoint.spec.structure.config).input_axis
    for name in names:
        before, after = checkpoint.tensor(name).data, read(name)
        keep = torch.zeros_like(before, dtype=torch.bool)
        keep.movedim(axis, 1)[:, ::2] = True
        assert torch.equal(after.mask, keep)
        assert torch.equal(after.data, torch.where(keep, before / 2, 0))
    spec = checkpoint.spec.map(lambda t: t if t.name not in names else _masked(t))
    written = write_checkpoint(Derived(checkpoint, spec, read), tmp_path / "out")
    model = load_checkpoint(open_checkpoint(written.folder), dtype="float32")
    inputs = inputs_of(checkpoint)
    blocks = find_blocks(model, architectures.of(checkpoint.spec.structure.config))
    seen = []
    blocks[-1].register_forward_pre_hook(
        lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model.base_model(**inputs.rows(range(SAMPLES)))
    from compress.blockwise.activations import Activations

    stored = Activations(
        tmp_path / "work" / f"inputs{(len(blocks) - 1) % 2}.act", SAMPLES, seen[0].shape[1:], torch.float32
    )
    assert torch.allclose(stored.read(range(SAMPLES)), seen[0], rtol=1e-4, atol=1e-5)


def _masked(tensor):
    from dataclasses import replace

    return replace(tensor, kept=tensor.count // 2)


class Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 1, 3])
def test_resumed_run_ends_with_the_same_bytes(at, device, folders, tmp_path):
    checkpoint = open_checkpoint(folders["llama"])
    whole = runner_of(checkpoint, tmp_path / "whole", with_targets=True, device=device).run(halve, "halving")

    def stopping(block):
        if block.index == at:
            halve(block)
            raise Stop
        return halve(block)

    with pytest.raises(Stop):
        runner_of(checkpoint, tmp_path / "broken", with_targets=True, device=device).run(stopping, "halving")
    computed = []
    runner_of(checkpoint, tmp_path / "broken", with_targets=True, device=device).run(
        lambda b: computed.append(b.index) or halve(b), "halving"
    )
    assert computed == list(range(at, 4))
    for path in sorted(whole.folder.iterdir()):
        assert path.read_bytes() == (tmp_path / "broken/blocks" / path.name).read_bytes()


def test_check_blockwise_names_a_block_that_differs(tmp_path, monkeypatch):
    """Something that changes hidden states between two blocks is noticed before any work, and the block is named."""
    checkpoint = open_checkpoint(pico.save(tmp_path / "in", "llama", with_tokenizer=False))
    runner = runner_of(checkpoint, tmp_path / "work")
    runner.streamed.layers[2].register_forward_pre_hook(lambda m, a: (a[0] * noise.pop(), *a[1:]))
    noise = [1.0, 1.5]
    with pytest.raises(PassError, match="this model cannot run block by block: block 2 run by itself differs"):
        runner.run(halve, "halving")
    assert not (tmp_path / "work/state.json").exists()


def test_check_blockwise_refuses_blocks_that_read_more_than_the_block_before(tmp_path):
    """gemma3n hands every block a stack of streams and embeddings of its own."""
    import transformers

    config = transformers.Gemma3nTextConfig(
        vocab_size=300, vocab_size_per_layer_input=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2, num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.0] * 4, layer_types=["full_attention"] * 4, architectures=["Gemma3nForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Gemma3nForCausalLM(config).save_pretrained(tmp_path / "in")
    record = Architecture(
        "gemma3n_text", prefix="model", blocks="layers", embeddings=("embed_tokens",), tie_default=True
    )
    architectures._by_type()["gemma3n_text"] = record
    try:
        checkpoint = open_checkpoint(tmp_path / "in")
        with pytest.raises(PassError, match="cannot run block by block"):
            runner_of(checkpoint, tmp_path / "work").run(halve, "halving")
    finally:
        del architectures._by_type()["gemma3n_text"]


def shared(checkpoint, name, source):
    """The checkpoint with one tensor stored as another, and as often as that one is."""
    spec = checkpoint.spec
    alias = replace(spec.tensors[source], name=name, alias_of=source)
    spec = replace(spec, tensors={**spec.tensors, name: alias})
    return Derived(checkpoint, spec, checkpoint.tensor)


def test_shared_tensor_is_solved_once_with_the_inputs_of_all_blocks(folders, tmp_path):
    matrix, source = (f"model.layers.{i}.mlp.up_proj.weight" for i in (3, 1))
    checkpoint = shared(open_checkpoint(folders["llama"]), matrix, source)
    inputs, seen, later = inputs_of(checkpoint), {}, []

    def change(block):
        for group, statistics, _ in block.statistics():
            seen[block.index] = ([s.name for s in group], statistics.hessian.clone(), statistics.tokens)
        assert block.frozen == {id(dict(block.module.named_parameters())["mlp.up_proj.weight"])}
        block.linears[0].weight.mul_(0.5)
        return {}

    runner = runner_of(checkpoint, tmp_path / "work", wanted={source}, with_targets=True)
    result = runner.run(change, "changing").reader()
    assert list(seen) == [1]
    model = load_checkpoint(open_checkpoint(folders["llama"]))
    layers = model.model.layers
    layers[3].mlp.up_proj.weight.data.copy_(layers[1].mlp.up_proj.weight.data)
    first, other = (linear_inputs(model, checkpoint, inputs, name).double() for name in (source, matrix))
    names, hessian, tokens = seen[1]
    assert names == [source]
    expected = first.T @ first + other.T @ other
    assert torch.dist(hessian.double(), expected) <= 1e-5 * expected.norm()
    assert tokens == len(first) + len(other)
    assert torch.equal(result(source).data, checkpoint.tensor(source).data / 2)

    def look(block):
        later.append(next(s.weight.clone() for s in find_linears(runner.streamed, 3, block.module, {matrix})[0]))
        return {}

    both = {source, "model.layers.3.mlp.down_proj.weight"}
    again = runner_of(checkpoint, tmp_path / "again", wanted=both)
    again.run(lambda block: change(block) if block.index == 1 else look(block), "changing")
    assert torch.equal(later[0], checkpoint.tensor(source).data / 2)  # from then on its users have the changed one


def test_shared_tensor_used_before_it_is_solved_is_refused(folders, tmp_path):
    matrix, source = (f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 3))
    checkpoint = shared(open_checkpoint(folders["llama"]), matrix, source)
    with pytest.raises(PassError, match=f"{matrix} is shared with {source}, which comes after it; leave it out"):
        runner_of(checkpoint, tmp_path, wanted={source})
    runner_of(checkpoint, tmp_path, wanted={"model.layers.3.mlp.down_proj.weight"}, with_targets=True)


def test_tensor_shared_within_a_block_may_change(folders, tmp_path):
    up, gate = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "gate"))
    runner_of(shared(open_checkpoint(folders["llama"]), up, gate), tmp_path, wanted={gate}, with_targets=True)


def test_nan_in_the_original_is_named_with_its_block(folders, tmp_path):
    base, name = open_checkpoint(folders["llama"]), "model.layers.1.mlp.down_proj.weight"
    broken = Value(torch.full_like(base.tensor(name).data, float("nan")))
    changed = Derived(base, base.spec, lambda n: broken if n == name else base.tensor(n))
    with pytest.raises(CheckpointError, match=r"block 1 gives NaN or infinite values"):
        runner_of(changed, tmp_path).run(halve, "halving")


def test_nan_after_a_change_is_named_with_its_block(folders, tmp_path):
    base = open_checkpoint(folders["llama"])

    def explode(block):
        if block.index == 1:
            next(s for s in block.linears if "down_proj" in s.name).weight.fill_(float("nan"))
        return {}

    with pytest.raises(Exception, match=r"block 1 gives NaN or infinite values"):
        runner_of(base, tmp_path).run(explode, "exploding")
    assert isinstance(base.tensor("model.norm.weight"), Value)


def test_open_runner_reads_token_types(tmp_path):
    """Pruned block by block with types, BERT's blocks see what the model whole sees; without them something else."""
    folder = pico.save(tmp_path / "in", "bert")
    ids = torch.randint(2, 250, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < torch.tensor([12, 9, 12, 5])[:, None]
    types = ((torch.arange(12) > 3) & mask).long()
    model = load_model(folder)
    outputs = []
    for batches in (Batches(ids, mask, ("a",) * 4, types), Batches(ids, mask, ("a",) * 4)):
        runner = open_runner(
            open_checkpoint(folder),
            ["bert.encoder.layer.3.output.dense.weight"],
            SimpleNamespace(
                data=lambda name, batches=batches: batches, dtype="float32", device="cpu", progress=SilentProgress(), seed=0,
                max_vram=None,
            ),
            workspace=Workspace(tmp_path / str(len(outputs))),
            with_targets=False,
        )  # fmt: skip
        found = []
        runner.run(lambda block, found=found: found.append(block.inputs.read([0, 1, 2, 3]).clone()) or {}, "look")
        outputs.append(found[-1])
    with torch.no_grad():
        args = {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": types, "output_hidden_states": True}
        expected = model(**args).hidden_states[3]
    assert torch.allclose(outputs[0][mask], expected[mask], atol=1e-5)
    assert not torch.allclose(outputs[1][mask], expected[mask], atol=1e-2)
