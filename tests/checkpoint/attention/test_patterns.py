"""Attention over a part of the tokens equals its slow twin: every pattern, in one piece, in chunks, step by step, with gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.checkpoint.attention import patterns
from compress.checkpoint.attention.patterns import LocalPattern, attention
from tests.checkpoint.attention.dense import dense_attention, sees

PATTERNS = [
    LocalPattern(),
    LocalPattern(window=5),
    LocalPattern(window=1),
    LocalPattern(window=5, sinks=3),
    LocalPattern(window=2, sinks=7),
    LocalPattern(window=5, stride=5),
    LocalPattern(window=6, stride=4),
    LocalPattern(window=3, stride=8, sinks=2),
    LocalPattern(block=6, stride=6),
    LocalPattern(block=6, last=1),
    LocalPattern(block=6, last=3, sinks=2),
    LocalPattern(window=5, last=1, period=4),
    LocalPattern(window=4, last=2, period=7, sinks=3),
    LocalPattern(block=7),
    LocalPattern(block=7, sinks=3),
]


def tensors(batch: int, tokens: int, known: int, dtype: torch.dtype = torch.float64, seed: int = 0):
    """Queries of four heads, keys and values of two, with tokens before heads in memory, as models have them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, 4), (known, 2), (known, 2))
    return [torch.randn((batch, *shape, 8), generator=generator, dtype=dtype).transpose(1, 2) for shape in shapes]


@pytest.fixture
def short_slices(monkeypatch):
    monkeypatch.setattr(patterns, "SLICE", 8)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("tokens", "past"),
    [(37, 0), pytest.param(11, 14, marks=pytest.mark.slow), (1, 30), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_equals_the_slow_twin_with_logits(pattern, masked, tokens, past, short_slices):
    query, key, value = tensors(2, tokens, tokens + past)
    for logits in (None, torch.tensor([0.5, -1e4, 2.0, -1.0])):
        got = attention(query, key, value, pattern, logits=logits, masked=masked, scale=0.4)
        assert torch.equal(got.transpose(1, 2).contiguous(), got.transpose(1, 2))
        torch.testing.assert_close(
            got, dense_attention(query, key, value, pattern, logits=logits, scale=0.4), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_gradients_are_those_of_the_definition(pattern, masked, short_slices):
    inputs = [*tensors(1, 13, 21), torch.tensor([0.5, -3.0, 2.0, 0.0], dtype=torch.float64)]
    inputs = [x.requires_grad_() for x in inputs]

    def ours(query, key, value, logits):
        return attention(query, key, value, pattern, logits=logits, masked=masked)

    grad = torch.randn(1, 4, 13, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = dense_attention(*inputs[:3], pattern, logits=inputs[3])
    expected = torch.autograd.grad(theirs, inputs, grad)
    torch.testing.assert_close(torch.autograd.grad(ours(*inputs), inputs, grad), expected, rtol=0, atol=1e-11)
    assert torch.autograd.gradcheck(ours, inputs, fast_mode=True)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("tokens", "past"), [pytest.param(29, 0, marks=pytest.mark.slow), (9, 14), (1, 22)])
def test_padding_hides_tokens_and_moves_the_first_ones(pattern, tokens, past, short_slices):
    query, key, value = tensors(3, tokens, tokens + past)
    padding = torch.ones(3, tokens + past, dtype=torch.long)
    padding[1, :7] = 0
    padding[2, -3:] = 0  # to the right: those queries mean nothing
    logits = torch.tensor([0.5, -1e4, 2.0, -1.0])
    for tops in (None, logits):
        got = attention(query, key, value, pattern, logits=tops, padding=padding)
        expected = dense_attention(query, key, value, pattern, logits=tops, padding=padding)
        real = padding[:, past:].bool()[:, None, :, None].expand_as(got)
        torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-12)
        assert got.isfinite().all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_keys_at_positions_of_a_cache_that_dropped_some(pattern, short_slices):
    positions = torch.tensor([0, 1, 2, 5, 11, 12, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27])
    query, key, value = tensors(2, 9, 17)
    got = attention(query, key, value, pattern, positions=positions)
    expected = dense_attention(query, key, value, pattern, positions=positions)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_a_cache_of_sinks_and_the_window_needs_no_positions():
    pattern, (query, key, value) = LocalPattern(window=6, sinks=3), tensors(1, 40, 40)
    whole = attention(query, key, value, pattern)
    for step in (1, 4):
        for end in range(20, 40, step):
            start = end - step
            kept = [*range(3), *range(start - 5, end)]
            part = attention(query[:, :, start:end], key[:, :, kept], value[:, :, kept], pattern)
            torch.testing.assert_close(part, whole[:, :, start:end], rtol=0, atol=1e-12)


@given(
    st.sampled_from(PATTERNS), st.integers(1, 90), st.integers(0, 60), st.booleans(), st.booleans(), st.integers(0, 9)
)
def test_any_length_of_chunk_in_any_slices(pattern, tokens, past, masked, logits, seed):
    query, key, value = tensors(1, tokens, tokens + past, seed=seed)
    tops = torch.linspace(-2, 2, 4) if logits else None
    got = attention(query, key, value, pattern, masked=masked, logits=tops)
    where = torch.arange(tokens + past)
    seen = patterns.visible(pattern, where[past:, None], where)
    scores = torch.einsum("bgrqd,bgkd->bgrqk", query.unflatten(1, (2, 2)), key).flatten(1, 2) * 8**-0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    if tops is not None:
        scores = torch.cat([scores, tops.double()[None, :, None, None].expand(1, -1, tokens, 1)], -1)
    shares = scores.softmax(-1)[..., : tokens + past]
    expected = torch.einsum("bgrqk,bgkd->bgrqd", shares.unflatten(1, (2, 2)), value).flatten(1, 2)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_visible_is_the_definition(pattern):
    where = torch.arange(40)
    seen = patterns.visible(pattern, where[:, None], where)
    assert seen.tolist() == [[sees(pattern, i, j) for j in range(40)] for i in range(40)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_float32_is_within_a_millionth(pattern, masked):
    query, key, value = tensors(1, 101, 150, torch.float32)
    where = torch.arange(150)
    seen = patterns.visible(pattern, where[49:, None], where)
    repeated = (x.repeat_interleave(2, 1).double() for x in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query.double(), *repeated, attn_mask=seen)
    got = attention(query, key, value, pattern, masked=masked)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [PATTERNS[3], PATTERNS[6], PATTERNS[9]], ids=str)
def test_narrow_dtypes_and_their_gradients(dtype, pattern):
    atol = {torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    query, key, value = (x.requires_grad_() for x in tensors(1, 150, 150, dtype))
    logits = torch.tensor([0.5, -3.0, 2.0, 0.0], requires_grad=True)
    expected = dense_attention(query, key, value, pattern, logits=logits)
    for masked in (True, False):
        got = attention(query, key, value, pattern, logits=logits, masked=masked)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=atol)
    inputs = (query, key, value, logits)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    ours = torch.autograd.grad(got.double().square().sum(), inputs)
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine.double() - reference).norm() <= 4 * atol * reference.norm()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_plain_products_where_no_fused_kernel_serves(pattern, padded, short_slices):
    """Values of another size than keys have no fused kernel, on any device."""
    query, key, value = tensors(2, 13, 21)
    inputs = [x.requires_grad_() for x in (query, key, value[..., :5])]
    padding = torch.ones(2, 21).index_fill_(1, torch.arange(3), 0) if padded else None
    for masked in (True, False):
        got = attention(*inputs, pattern, masked=masked, padding=padding)
        expected = dense_attention(*inputs, pattern, padding=padding)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        ours, theirs = (torch.autograd.grad(out.square().sum(), inputs) for out in (got, expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 0}, "at least 1"),
        ({"window": 4, "block": 4}, "a window or a block"),
        ({"window": 4, "last": 1}, "at most the period"),
        ({"block": 4, "last": 5}, "at most the period"),
        ({"block": 4, "stride": 2}, "is as long"),
        ({"block": 4, "last": 1, "period": 2}, "is as long"),
        ({"window": 4, "last": 1, "period": 2, "stride": 2}, "a stride or last tokens"),
        ({"stride": 2}, "need a window or a block"),
        ({"window": 4, "sinks": -1}, "at least 0"),
    ],
)
def test_patterns_without_a_meaning_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LocalPattern(**wrong)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_gpu_computes_the_same_with_gradients(pattern, dtype):
    atol = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    tops = torch.tensor([0.5, -3.0, 2.0, 0.0], device="cuda")
    for tokens, past in ((150, 0), (40, 60), (1, 99)):
        inputs = [x.cuda().requires_grad_() for x in tensors(2, tokens, tokens + past, dtype)]
        padding = torch.ones(2, tokens + past, device="cuda")
        padding[0, :5] = 0
        drop = max(0, 5 - past)  # queries that are padding
        for more in ({}, {"logits": tops}, {"padding": padding}):
            got = attention(*inputs, pattern, **more)[:, :, drop:]
            where = {name: x.cpu() for name, x in more.items()}
            expected = dense_attention(*(x.cpu() for x in inputs), pattern, **where)[:, :, drop:]
            torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=atol)
            ours, theirs = (torch.autograd.grad(x.double().square().sum(), inputs) for x in (got, expected))
            for mine, reference in zip(ours, theirs, strict=True):
                assert (mine - reference).double().norm() <= 4 * atol * reference.double().norm() + 1e-6


def test_autocast_with_keys_in_float32():
    """Rotary positions give queries and keys in float32 beside values in bfloat16."""
    query, key, value = tensors(1, 40, 40, torch.float32)
    got = attention(query, key, value.bfloat16(), LocalPattern(window=9))
    assert got.dtype == torch.bfloat16
    expected = dense_attention(query, key, value, LocalPattern(window=9))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-2)


@pytest.mark.parametrize("numbers", [True, False])
def test_a_mask_of_all_pairs_in_place_of_a_pattern(numbers, short_slices):
    query, key, value = tensors(2, 20, 31)
    seen = torch.rand(2, 1, 20, 31, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[..., 0] = True
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if numbers else seen
    repeated = [x.repeat_interleave(2, 1) for x in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=seen)
    got = attention(query, key, value, LocalPattern(), mask=mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="a mask of all pairs is"):
        attention(query, key, value, LocalPattern(), mask=mask.expand(-1, 4, -1, -1))
