"""Padding does not count in sums, wherever a class lays out or widens the tokens of a sample by itself."""

from __future__ import annotations

import pytest
import torch
import transformers

from compress.blockwise.inputs import Inputs
from compress.blockwise.linears import TargetLinear, group_linears
from compress.checkpoint.open import open_checkpoint
from compress.models.pico import pico_model
from compress.models.shrink import default_config, shrunken
from tests.toolbox import runner_of

LENGTHS = torch.tensor([12, 5, 8, 3])


@pytest.mark.parametrize(
    "name", ["LongformerForMaskedLM", pytest.param("LEDForConditionalGeneration", marks=pytest.mark.slow)]
)
def test_padding_is_told_where_tokens_come_first_or_are_filled_up(name, tmp_path):
    """Longformer's attention reads [length, samples, I], of 12 tokens filled up to its windows of 16."""
    cls = getattr(transformers, name)
    pico_model(cls, shrunken(default_config(cls.config_class.model_type))).save_pretrained(tmp_path / "in")
    ids = torch.randint(5, 250, (4, 12), generator=torch.Generator().manual_seed(0))
    values, mask, target = {"input_ids": ids}, torch.arange(12) < LENGTHS[:, None], None
    if cls.config_class.model_type == "led":
        values["decoder_input_ids"] = ids[:, :9].flip(1)
        target = mask[:, :9]
    checkpoint, reads = open_checkpoint(tmp_path / "in"), {}
    model = cls.from_pretrained(tmp_path / "in").eval()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, a, path=path: reads.__setitem__(f"{path}.weight", a[0].double()))
    with torch.no_grad():
        model(**values, attention_mask=mask.long())
    seen = {}

    def look(block):
        seen.update({linear.name: sums.hessian for group, sums, _ in block.statistics() for linear in group})
        return {}

    runner_of(checkpoint, tmp_path / "work", Inputs(values, mask, target)).run(look, "looking")
    called = [name for name in seen if name in reads]
    assert len(called) >= 18
    for name in called:
        x = reads[name] if len(reads[name]) == 4 else reads[name].transpose(0, 1)
        own = mask if x.shape[1] in (12, 16) else target
        x = x[:, : own.shape[1]][own]
        torch.testing.assert_close(seen[name].double(), x.T @ x, rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SwitchTransformersForConditionalGeneration", "NllbMoeForConditionalGeneration"])
def test_padding_reaches_no_expert_that_a_list_of_modules_calls(name, tmp_path):
    """Hessians of an expert are those of the tokens that the router sends there, one sample at a time and unpadded."""
    cls = getattr(transformers, name)
    config = shrunken(default_config(cls.config_class.model_type))
    config.encoder_sparse_step = config.decoder_sparse_step = 2
    pico_model(cls, config).save_pretrained(tmp_path / "in")
    ids = torch.randint(5, 250, (4, 12), generator=torch.Generator().manual_seed(0))
    values, mask = {"input_ids": ids, "decoder_input_ids": ids[:, :9].flip(1)}, torch.arange(12) < LENGTHS[:, None]
    checkpoint, reads = open_checkpoint(tmp_path / "in"), {}
    model = cls.from_pretrained(tmp_path / "in").eval()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".experts." in path:
            module.register_forward_pre_hook(
                lambda m, a, path=path: reads.setdefault(f"{path}.weight", []).append(a[0].double())
            )
    with torch.no_grad():
        for row, length in enumerate(LENGTHS):
            read = values["decoder_input_ids"][row : row + 1, : min(9, length)]
            model(input_ids=ids[row : row + 1, :length], decoder_input_ids=read)
    seen = {}

    def look(block):
        seen.update({linear.name: sums for group, sums, _ in block.statistics() for linear in group})
        return {}

    runner_of(checkpoint, tmp_path / "work", Inputs(values, mask, mask[:, :9])).run(look, "looking")
    assert len(reads) >= 8
    for name in reads:
        x = torch.cat(reads[name])
        assert seen[name].tokens == len(x), name
        torch.testing.assert_close(seen[name].hessian.double(), x.T @ x, rtol=1e-4, atol=1e-3, msg=name)


class Twice(torch.nn.Module):
    """Layers that begin with the same tensor, and do not read the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (torch.nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        y = self.a(x) + self.b(x) + self.c(x) + self.c(x * 2)
        x += 1
        return y + self.d(x)


def test_layers_that_read_the_same_in_every_call_share_statistics():
    module = Twice()
    linears = [TargetLinear(n, f"{n}.weight", m.weight.data, False, m) for n, m in module.named_children()]
    with torch.no_grad():
        groups, _ = group_linears(linears, lambda: module(torch.ones(2, 4)))
    assert [[linear.name for linear in group] for group in groups] == [["a", "b"], ["c"], ["d"]]
