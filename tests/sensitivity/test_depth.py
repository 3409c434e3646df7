"""Which blocks a model can best do without: trials on kept hidden states against runs of the whole model, and their races."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.open import open_checkpoint
from compress.data.batches import Batches, Features
from compress.errors import PassError
from compress.models.loading import load_model
from compress.progress import SilentProgress
from compress.sensitivity.depth import DepthOptions, choose_blocks
from compress.sensitivity.depth_states import KeptStates, WholeModel
from compress.workspace import Workspace
from tests import pico, toolbox

WORK = {"dtype": "float32", "device": "cpu"}
OPTIONS = DepthOptions("float32", "cpu")


def ids(samples: int, length: int) -> torch.Tensor:
    return torch.randint(2, 250, (samples, length), generator=torch.Generator().manual_seed(3))


def batches(family: str) -> Batches:
    """Texts, padded ones where the class reads both sides; or images."""
    if family == "vit":
        images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        read = Features("pixel_values", list("012345"), lambda names: images[[int(n) for n in names]])
        return Batches(torch.arange(6)[:, None], features=read)
    mask = torch.arange(24) < torch.tensor([24, 9, 17, 24, 3, 20])[:, None]
    return Batches(ids(6, 24), mask if "bert" in family.lower() else None)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", None),
        *(
            pytest.param("bert", name, marks=pytest.mark.slow)
            for name in ("BertForSequenceClassification", "BertModel")
        ),
        *(pytest.param(family, None, marks=pytest.mark.slow) for family in pico.ONE_LIST if family != "llama"),
    ],
)
def test_losses_on_kept_states_match_the_whole_model(family, name, tmp_path):
    """Also once blocks are gone, for groups, and for states that an earlier trial left."""
    folder = pico.folder(family) if name is None else tmp_path / "in"
    if name is not None:
        pico.model(family, class_name=name).save_pretrained(folder)
    checkpoint, samples = open_checkpoint(folder), batches(family)
    kept = KeptStates(checkpoint, samples, tmp_path / "states", **WORK)
    whole = WholeModel(checkpoint, samples, **WORK)
    assert kept.counts == whole.counts
    singles, pairs = [(i,) for i in range(4)], list(combinations(range(4), 2))
    for sets, base in ((singles, ()), ([p for p in pairs if 2 in p], (2,)), (pairs, (1, 2)), ([(0, 1, 3)], (0, 3))):
        for rows in ([0, 1], [2, 3, 4, 5]):
            expected = torch.tensor(whole.losses(sets, rows, base))
            torch.testing.assert_close(torch.tensor(kept.losses(sets, rows, base)), expected, rtol=1e-4, atol=1e-6)
    for rows in ([0, 1, 2], [1]):
        expected = pytest.approx(whole.angles([(1, 3), (0, 4)], rows), rel=1e-5)
        assert kept.angles([(1, 3), (0, 4)], rows) == expected
    assert any((tmp_path / "states").iterdir())
    kept.close()
    assert not any((tmp_path / "states").iterdir())


def test_losses_are_divergences_from_the_original(tmp_path):
    """KL(original ∥ without two blocks) by stock transformers, for each sample."""
    folder, texts = pico.folder("llama"), ids(5, 20)
    kept = KeptStates(open_checkpoint(folder), Batches(texts), tmp_path, **WORK)
    with torch.no_grad():
        before = load_model(folder)(texts).logits.log_softmax(-1)
        toolbox.bypass(model := load_model(folder), [1, 2])
        after = model(texts).logits.log_softmax(-1)
    expected = (before.exp() * (before - after)).sum(-1).mean(-1)
    torch.testing.assert_close(torch.tensor(kept.losses([(1, 2)], range(5), ())[0]), expected, rtol=1e-4, atol=1e-6)


def choose(folder: Path, work: Path, count: int, samples: int = 32, progress=None, **options):
    """The choice, on samples of 128 tokens so that sets leave after 4 of them."""
    return choose_blocks(
        open_checkpoint(folder),
        Batches(ids(samples, 128)),
        count,
        DepthOptions("float32", "cpu", **options),
        workspace=Workspace(work),
        progress=progress or SilentProgress(),
    )


def damped(folder: Path, shares: dict[int, float]) -> Path:
    """A pico GPT-2 of 64 positions more, whose blocks write these shares of what they did."""
    pico.save(folder, "gpt2", n_positions=128, with_tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    for index, share in shares.items():
        for part in ("attn.c_proj", "mlp.c_proj"):
            for kind in ("weight", "bias"):
                name = next(n for n in tensors if n.endswith(f"h.{index}.{part}.{kind}"))
                tensors[name] = tensors[name] * share
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_race_ends_with_the_choice_of_all_samples(tmp_path):
    """In much fewer trials; the second removal does not try what was clearly worse before."""
    folder = damped(tmp_path / "in", {0: 0.3, 2: 0.03, 3: 0.1})
    quick = choose(folder, tmp_path / "quick", 2, groups=False)
    full = choose(folder, tmp_path / "full", 2, groups=False, error=0)
    assert quick.order == full.order == [2, 3]
    assert [[trial.samples for trial in step.values()] for step in full.steps] == [[32] * 4, [32] * 3]
    assert sum(trial.samples for step in quick.steps for trial in step.values()) <= 32
    assert quick.steps[1][1].samples == 0
    assert "1" not in quick.details()["loss_without_block"][1]
    exact = full.steps[0][2].loss
    assert quick.steps[0][2].loss == pytest.approx(exact, rel=0.3)


@pytest.mark.slow
def test_a_contiguous_group_goes_where_its_blocks_undo_each_other(tmp_path):
    """Blocks 1 and 2 add a vector and take it away: neither can go alone, and both together cost nothing."""
    folder = damped(tmp_path / "in", {1: 0.0, 2: 0.0})
    tensors = load_file(folder / "model.safetensors")
    vector = 30 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    for index, sign in ((1, 1), (2, -1)):
        name = next(n for n in tensors if n.endswith(f"h.{index}.mlp.c_proj.bias"))
        tensors[name] = sign * vector
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    choice = choose(folder, tmp_path / "work", 2)
    assert choice.order == [1, 2]
    assert choice.groups[1, 2].loss == pytest.approx(0, abs=1e-4)
    greedy = [trial.loss for blocks, trial in choice.groups.items() if blocks != (1, 2)]
    assert min(greedy) > 0.05
    alone = choose(folder, tmp_path / "alone", 2, groups=False)
    assert sorted(alone.order) != [1, 2]


class Killed(Exception):
    pass


class Killing(SilentProgress):
    """Stops the work after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def task(self, title, total=None, unit="tensors"):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def advance(self, steps=1, note=""):
        self.left -= steps > 0
        if self.left < 0:
            raise Killed


@pytest.mark.slow
def test_choice_resumes_with_the_same_losses(tmp_path):
    """To the last bit, wherever it was stopped."""
    folder = damped(tmp_path / "in", {0: 0.3, 2: 0.05, 3: 0.06})
    expected = choose(folder, tmp_path / "whole", 2)
    for steps in (1, 3, 5):
        with pytest.raises(Killed):
            choose(folder, tmp_path / str(steps), 2, progress=Killing(steps))
        assert Workspace(tmp_path / str(steps)).read_json("trials")
        assert choose(folder, tmp_path / str(steps), 2) == expected
        assert [path.name for path in (tmp_path / str(steps)).iterdir()] == ["trials.json"]


@pytest.mark.slow
def test_a_model_that_reads_more_than_hidden_states_is_run_whole(tmp_path):
    """gemma3n hands every block a stack of streams and embeddings of its own."""
    import transformers

    config = transformers.Gemma3nTextConfig(
        vocab_size=300, vocab_size_per_layer_input=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2, num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.0] * 4, layer_types=["full_attention"] * 4, architectures=["Gemma3nForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Gemma3nForCausalLM(config).save_pretrained(tmp_path / "in")
    messages: list[str] = []

    class Heard(SilentProgress):
        def message(self, text: str) -> None:
            messages.append(text)

    choice = choose(tmp_path / "in", tmp_path / "work", 1, samples=4, progress=Heard())
    assert "every trial without a block runs the whole model: " in messages[0]
    assert len(choice.steps[0]) == 4
    with pytest.raises(PassError, match=r"needs the whole model in memory, 0.00 GB: .* raise max_ram"):
        choose(tmp_path / "in", tmp_path / "refused", 1, samples=4, max_ram=1000)
