"""Trellis-coded quantisation (QTIP, arXiv 2406.11235): the sequences of codes with the least error, by Viterbi's algorithm.

A state of 10 bits shifts in K bits for each weight, and each state has a value (`checkpoint.storage.trellis`). So a weight
has a choice of 2^K values that depends on its neighbours' codes: at 2 bits the squared error of a normal distribution is
0.078 of its variance, where the best four fixed values leave 0.118. A sequence runs along the outputs of one input, so that
the columns not yet quantised compensate for its error as in GPTQ.

Letters: O outputs, I inputs, S sequences, N weights of a sequence, P = 2^K codes, R low parts of a state, Q = R / P.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from compress.checkpoint.storage.trellis import STATE_BITS, rotate, sequences, state_values

#: Bits of a code ▶ the share of a normal distribution's variance that stays as error.
LEFT = {2: 0.079, 3: 0.022, 4: 0.0064}
#: Weights before and after the ends of a sequence that decide on the state there.
_OVERLAP = 24
#: Sequences at a time: enough to keep the processor busy.
_AT_ONCE = 96
#: Most columns at a time: they do not compensate for one another, which costs 5 % of the error with 8 and 11 % with 16.
_COLUMNS = 8
#: Columns after which their errors are subtracted from all others.
_BLOCK = 128


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for operations that are too small for more: two take 1.4 times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class TrellisCoder:
    """Finds codes of the trellis of ``bits`` bits a weight on a device."""

    def __init__(self, bits: int, device: torch.device) -> None:
        self.bits, self.P, self.R = bits, 1 << bits, 1 << (STATE_BITS - bits)
        self.Q = self.R // self.P
        #: Values of the states [2^10].
        self.values = state_values().to(device)
        #: Squares of the values, and -2 times the values, [2^10, 2].
        self._powers = torch.stack([self.values.square(), -2 * self.values], 1)

    def states(self, x_NS: torch.Tensor, weight_NS: torch.Tensor) -> torch.Tensor:
        """States, int64 [N, S], of circular sequences with a small error Σ weight (x - value)².

        The state at the ends is that of the best path through the last and first weights; then the best path through it.
        """
        count = min(_OVERLAP, len(x_NS))
        around = [torch.cat([t[-count:], t[:count]]) for t in (x_NS, weight_NS)]
        ends_S = self._path(around[0], around[1], None)[count - 1] % self.R
        return self._path(x_NS, weight_NS, ends_S)

    def _path(self, x_NS: torch.Tensor, weight_NS: torch.Tensor, ends_S: torch.Tensor | None) -> torch.Tensor:
        """States of the best path; low part of the state before it and of its last one: ``ends_S``, None for any."""
        (N, S), P, R, Q = x_NS.shape, self.P, self.R, self.Q
        factors_N2S = torch.stack([weight_NS, weight_NS * x_NS], 1)
        number_S = torch.arange(S, device=x_NS.device)
        least_NRS = x_NS.new_zeros(N + 1, R, S)  # least cost of a path by its low part
        if ends_S is not None:
            least_NRS[0].fill_(1e30)[ends_S, number_S] = 0
        cost = x_NS.new_empty(P, R, S)
        rows, by_rest = cost.view(-1, S), cost.view(P, Q, P, S)
        befores, afters = least_NRS[:-1].view(N, P, Q, 1, S).unbind(), least_NRS[1:].unbind()
        for factors_2S, before, after in zip(factors_N2S.unbind(), befores, afters, strict=True):
            torch.mm(self._powers, factors_2S, out=rows)
            by_rest.add_(before)
            # the next state forgets the highest bits of this one: of those that differ in them alone, the best counts
            torch.amin(cost, 0, out=after)
        low_S = least_NRS[N].argmin(0) if ends_S is None else ends_S
        return self._back(x_NS, weight_NS, least_NRS, low_S)

    def _back(
        self, x_NS: torch.Tensor, weight_NS: torch.Tensor, least_NRS: torch.Tensor, low_S: torch.Tensor
    ) -> torch.Tensor:
        """States of the best path that ends with the low part ``low_S``, from the least costs of all paths."""
        (N, S), P, R, Q = x_NS.shape, self.P, self.R, self.Q
        high_P1 = torch.arange(P, device=x_NS.device)[:, None]
        before_PS, last_P1 = high_P1 * (Q * S) + torch.arange(S, device=x_NS.device), high_P1 * R
        tensors = self.values, x_NS, weight_NS, least_NRS, low_S, before_PS, last_P1
        arrays: tuple[Any, ...] = (
            tensors if x_NS.is_cuda else tuple(t.numpy() for t in tensors)
        )  # numpy's calls cost less
        values, x, weight, least, low, before, last = arrays
        states = []
        for n in range(N - 1, -1, -1):
            rest = low >> self.bits
            error = values.take(last + low)
            error -= x[n]
            error *= error
            error *= weight[n]
            error += least[n].take(before + rest * S)
            high = error.argmin(0)
            states.append(torch.as_tensor(high * R + low))
            low = high * Q + rest
        return torch.stack(states[::-1])

    def columns(self, w_CO: torch.Tensor, scale_O: torch.Tensor) -> torch.Tensor:
        """States, int16 [C, O], of columns of weights, of which each is quantised alone."""
        states_CO = torch.empty(w_CO.shape, dtype=torch.int16, device=w_CO.device)
        x_CO, weight_O = w_CO / scale_O, scale_O.square() / scale_O.square().mean()
        lengths = sequences(w_CO.shape[1])
        start = 0
        for length in dict.fromkeys(lengths):  # two at most
            count = lengths.count(length)
            part = slice(start, start + count * length)
            x_NS = x_CO[:, part].reshape(-1, length).t()
            weight_NS = weight_O[part].view(count, length).repeat(len(w_CO), 1).t()
            parts = zip(torch.split(x_NS, _AT_ONCE, 1), torch.split(weight_NS, _AT_ONCE, 1), strict=True)
            with _one_thread():
                states_NS = torch.cat([self.states(x.contiguous(), weight.contiguous()) for x, weight in parts], 1)
            states_CO[:, part] = states_NS.t().reshape(len(w_CO), -1).to(torch.int16)
            start = part.stop
        return states_CO


def values_of(states_OI: torch.Tensor) -> torch.Tensor:
    """Values of states, float32 [O, I], without scales, still rotated."""
    return state_values().to(states_OI.device)[states_OI.int()]


def row_scales(W_OI: torch.Tensor) -> torch.Tensor:
    """Root mean squares of the rows, [O, 1]: rotated weights over them are close to a standard normal distribution."""
    return W_OI.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)


def likely_error(W_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """An error [O, I] as large as that of codes, without finding them, the same for the same weights.

    After the rotation weights are normal: codes of least squares shrink them by the share of their variance that is lost, and
    the rest of the error is noise, which a rotation leaves as it is.
    """
    share, draw = LEFT[bits], torch.Generator(W_OI.device).manual_seed(0)
    noise_OI = torch.randn(W_OI.shape, generator=draw, device=W_OI.device) * row_scales(W_OI)
    error_OI: torch.Tensor = noise_OI * float(share * (1 - share)) ** 0.5 - share * W_OI
    return error_OI


def trellis_nearest(W_OI: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States, int16 [O, I], and scales [O, 1] of weights, float32, without calibration: least squares after rotation."""
    rotated = rotate(W_OI)
    trellis, scale_O1 = TrellisCoder(bits, W_OI.device), row_scales(rotated)
    states_OI = trellis.columns(rotated.t().contiguous(), scale_O1[:, 0]).t().contiguous()
    values = trellis.values[states_OI.int()]
    return states_OI, (rotated * values).sum(1, keepdim=True) / values.square().sum(1, keepdim=True)


def trellis_gptq(
    W_OI: torch.Tensor, U_II: torch.Tensor, order_I: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """States, int16 [O, I], and scales [O, 1] of rotated weights; later columns compensate for the error (GPTQ).

    A few columns are quantised at a time; they do not compensate for one another.

    Args:
        W_OI: rotated weights, float32.
        U_II, order_I: factor and order of the rotated Hessian, as in `gptq.compensated`.
    """
    scale_O1 = row_scales(W_OI)
    trellis, scale_O = TrellisCoder(bits, W_OI.device), scale_O1[:, 0]
    W_IO = W_OI.t()[order_I].contiguous()
    states_IO = torch.empty(W_IO.shape, dtype=torch.int16, device=W_OI.device)
    step = min(_COLUMNS, max(1, _AT_ONCE // len(sequences(len(W_OI)))))
    for start in range(0, len(W_IO), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(W_IO)))
        error_BO = torch.empty_like(W_IO[block])
        for first in range(block.start, block.stop, step):
            columns = slice(first, min(first + step, block.stop))
            states_IO[columns] = trellis.columns(W_IO[columns], scale_O)
            error_CO = W_IO[columns] - trellis.values[states_IO[columns].int()] * scale_O
            error_CO = torch.linalg.solve_triangular(U_II[columns, columns].mT, error_CO, upper=False)
            error_BO[first - start : columns.stop - start] = error_CO
            W_IO[columns.stop : block.stop] -= U_II[columns, columns.stop : block.stop].mT @ error_CO
        W_IO[block.stop :] -= U_II[block, block.stop :].mT @ error_BO
    states_OI = torch.empty_like(states_IO.t(), memory_format=torch.contiguous_format)
    states_OI[:, order_I] = states_IO.t()
    return states_OI, scale_O1
