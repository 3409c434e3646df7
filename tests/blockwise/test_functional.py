from __future__ import annotations

import torch
from torch.nn import functional

from compress.blockwise.functional import projections_as_calls

HEADS, WIDTH, LENGTH, SAMPLES = 2, 8, 5, 3


class Attention(torch.nn.Module):
    """Attention as WavLM has it: the weights of four layers, of which none is called."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(0, 1)
        output, _ = functional.multi_head_attention_forward(
            x, x, x, WIDTH, HEADS, torch.empty(0), torch.cat((self.q.bias, self.k.bias, self.v.bias)), None, None, False,
            0.0, self.o.weight, self.o.bias, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=self.q.weight, k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
        )  # fmt: skip
        return output.transpose(0, 1)


@torch.no_grad()
def test_projections_of_functional_attention_are_seen_as_calls():
    torch.manual_seed(0)
    attention, x = Attention(), torch.randn(SAMPLES, LENGTH, WIDTH)
    before = (functional.linear, functional.multi_head_attention_forward)
    plain = attention(x)
    reads, writes = {}, {}
    for name, layer in attention.named_children():
        layer.register_forward_pre_hook(lambda m, a, name=name: reads.__setitem__(name, a[0]))
        layer.register_forward_hook(lambda m, a, output, name=name: writes.__setitem__(name, output))
    assert torch.equal(attention(x), plain)
    assert not reads
    with projections_as_calls(attention):
        assert torch.equal(attention(x), plain)
    assert before == (functional.linear, functional.multi_head_attention_forward)
    for name in "qkv":
        assert torch.equal(reads[name], x)
    torch.testing.assert_close(writes["k"], attention.k(x))
    q, k, v = (getattr(attention, name)(x).view(SAMPLES, LENGTH, HEADS, -1).transpose(1, 2) for name in "qkv")
    heads = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(reads["o"], heads)
    assert torch.equal(writes["o"], plain)
