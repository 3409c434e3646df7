"""A micro-benchmark of this machine's CPU: seconds per unit of each kind of work, in half a minute.

Every solver is measured as passes call it, on small matrices of random weights and inputs whose covariance falls as that of
trained models does. With one thread CPU seconds are measured, which other processes change little.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.functional import kl_div, scaled_dot_product_attention, silu

from compress.blockwise.hessians import InputStatistics, hessian_dtype
from compress.progress import Progress
from compress.solvers.alps import alps, problem
from compress.solvers.gptq import act_order_factor, gptq
from compress.solvers.hessian import damped, inverse, inverse_factor
from compress.solvers.low_rank import low_rank
from compress.solvers.obs import least_squares, obs_prune_groups
from compress.solvers.quant_format import fit, integer_codes
from compress.solvers.quantease import quantease
from compress.solvers.shared_matrix import shared_matrix
from compress.solvers.sparsegpt import sparsegpt
from compress.solvers.trellis import TrellisCoder
from compress.solvers.wanda import keep_wanda
from compress.solvers.yaqa import gptq_kronecker, kronecker_error, shrunk, yaqa
from compress.spec.formats import QuantFormat
from compress.work import TERMS, Rates, keep_rates, terms

#: Tokens of a batch that is measured.
_TOKENS = 1024
#: Rounds of QuantEase, as `cast` has them.
_ROUNDS = 3
_FORMAT = QuantFormat("int4", 64)

#: A size (O, I), and the seconds per time of the kind there.
SizeSeconds = tuple[int, int, float]
_T = TypeVar("_T")


#: Share of the cores that others may have while several threads are measured: threads wait for the slowest of them.
_OTHERS = 0.1
#: Seconds in which others are looked for before.
_GLANCE = 0.3


def kept_rates(progress: Progress) -> Rates:
    """Measure the rates, and keep them for `cached_rates` unless other processes falsified them.

    Where others have the cores, one thread is measured in place of several: its CPU seconds are right, if more than the rest.
    """
    threads = torch.get_num_threads()
    busy = threads > 1 and _others_share(partial(time.sleep, _GLANCE))[0] > _OTHERS
    if busy:
        torch.set_num_threads(1)
    try:
        share, rates = _others_share(partial(measure_rates, progress))
    finally:
        torch.set_num_threads(threads)
    if busy or (threads > 1 and share > _OTHERS):
        progress.message(
            f"other processes took {share:.0%} of {len(_own_cores())} cores: the times are rough, and not kept"
        )
    else:
        keep_rates(rates)
    return rates


def _others_share(work: Callable[[], _T]) -> tuple[float, _T]:
    """Share of this process's cores that other processes had during some work, and its result."""
    start, others = time.perf_counter(), _others_seconds()
    result = work()
    return (_others_seconds() - others) / (len(_own_cores()) * (time.perf_counter() - start)), result


def _own_cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _others_seconds(stat: Path = Path("/proc/stat")) -> float:
    """CPU seconds that other processes have had on the cores of this one; 0 where the system does not tell."""
    try:
        rows = [line.split() for line in stat.read_text().splitlines()]
    except OSError:
        return 0.0
    names = {f"cpu{core}" for core in _own_cores()}
    ticks = sum(int(row[i]) for row in rows if row and row[0] in names for i in (1, 2, 3))  # user, nice, system
    times = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") - sum(times[:4])


def measure_rates(progress: Progress) -> Rates:
    """The rates of this machine's CPU with torch's present number of threads; the random state of torch is kept."""
    seconds: dict[str, tuple[float, ...]] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        measures = [_products, _values, _training, _factors, _solvers, _pruning, _low_rank, _disk, _start]
        with progress.task("measuring this machine", len(measures), "parts") as task:
            for measure in measures:
                seconds |= {kind: _fitted(kind, rows) for kind, rows in measure().items()}
                task.advance()
    return Rates(seconds)


def _seconds(work: Callable[[], object], most: float = 0.15) -> float:
    """The least time of a call, of two or more until they took ``most`` seconds together; the first warms up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    work_start, least, calls = clock(), float("inf"), 0
    while calls < 2 or (clock() - work_start < most and calls < 50):
        start = clock()
        work()
        least, calls = min(least, clock() - start), calls + 1
        if least > most:
            break
    return least


def _fitted(kind: str, rows: Sequence[SizeSeconds]) -> tuple[float, ...]:
    """Non-negative rates of a kind's terms with the least squared relative error over the measurements."""
    count = len(TERMS[kind])
    design = torch.tensor([[t / s for t in terms(kind, o, i)] for o, i, s in rows], dtype=torch.float64)
    best, result = float("inf"), torch.zeros(count, dtype=torch.float64)
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            part = design[:, chosen]
            scale = part.norm(dim=0)
            solved = (
                torch.linalg.lstsq(part / scale, torch.ones(len(rows), 1, dtype=torch.float64)).solution[:, 0] / scale
            )
            error = float((part @ solved - 1).square().sum())
            if bool((solved >= 0).all()) and error < best - 1e-9:
                best = error
                result = torch.zeros(count, dtype=torch.float64)
                result[list(chosen)] = solved
    return tuple(result.tolist())


def _inputs(tokens: int, width: int) -> torch.Tensor:
    """Random inputs [tokens, width] with a covariance whose eigenvalues fall, in a random basis of 64 channels at a time."""
    scale = torch.arange(1, width + 1).float().pow(-0.5)
    x = torch.randn(tokens, width) * scale[torch.randperm(width)]
    mix = torch.linalg.qr(torch.randn(64, 64))[0]
    mixed: torch.Tensor = (x.view(tokens, -1, 64) @ mix).reshape(tokens, width)
    return mixed.contiguous()


def _hessian(width: int) -> tuple[InputStatistics, torch.Tensor]:
    """Statistics of random inputs, and their Hessian."""
    statistics = InputStatistics(torch.zeros(width, width, dtype=hessian_dtype(width)))
    statistics.add(_inputs(4 * width, width))
    statistics.finish()
    return statistics, statistics.hessian


def _products() -> dict[str, list[SizeSeconds]]:
    products: list[SizeSeconds] = []
    for outputs, inputs in ((256, 256), (704, 256), (576, 1536), (1024, 1024), (2048, 2048)):
        x, w = torch.randn(_TOKENS, inputs), torch.randn(outputs, inputs)
        products.append((outputs, inputs, _seconds(partial(torch.nn.functional.linear, x, w)) / _TOKENS))
    hessians: dict[str, list[SizeSeconds]] = {"hessian": [], "hessian_wide": []}
    for width in (256, 704, 1536, 2304):
        kind, tokens = ("hessian", 4 * _TOKENS) if width <= 2048 else ("hessian_wide", _TOKENS)
        x, statistics = (
            torch.randn(tokens, width),
            InputStatistics(torch.zeros(width, width, dtype=hessian_dtype(width))),
        )
        hessians[kind].append((0, width, _seconds(partial(statistics.add, x)) / tokens))
    return {"product": products, **hessians}


def _values() -> dict[str, list[SizeSeconds]]:
    x = torch.randn(_TOKENS, 1024)
    values = _seconds(lambda: silu(x) * x + x) / x.numel()
    q = torch.randn(4, 8, 256, 64)
    attention = _seconds(lambda: scaled_dot_product_attention(q, q, q, is_causal=True)) / _TOKENS
    parameter = torch.nn.Parameter(torch.randn(1024, 1024))
    optimizer, removed = torch.optim.Adam([parameter], lr=1e-9, foreach=True), torch.rand(1024, 1024) < 0.5

    def step() -> None:
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        parameter.masked_fill_(removed, 0)

    adam = _seconds(step) / parameter.numel()
    w, rounded = torch.randn(512, 1024), {}
    for kind, search in (("nearest", False), ("searched", True)):
        rounded[kind] = [(512, 1024, _seconds(partial(_rounded, w, search), 0.05))]
    return {"values": [(0, 1, values)], "attention": [(512, 256, attention)], "adam": [(0, 1, adam)], **rounded}


def _rounded(weight: torch.Tensor, search: bool) -> None:
    integer_codes(weight, _FORMAT, fit(weight, _FORMAT, None, None, search=search))


def _training() -> dict[str, list[SizeSeconds]]:
    parameter = torch.nn.Parameter(torch.randn(1024, 1024))
    optimizer = torch.optim.AdamW([parameter], lr=1e-9, fused=True)

    def step() -> None:
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    logits, others = torch.randn(2, 128, 1 << 15)

    def diverge() -> None:
        kl_div(logits.log_softmax(-1), others.log_softmax(-1), reduction="sum", log_target=True)

    return {
        "adamw": [(0, 1, _seconds(step) / parameter.numel())],
        "logits": [(0, 1, _seconds(diverge) / logits.numel())],
    }


def _factors() -> dict[str, list[SizeSeconds]]:
    kinds = ("factor", "factor_wide", "eigen", "eigen_wide", "inverse")
    rows: dict[str, list[SizeSeconds]] = {kind: [] for kind in kinds}
    for width in (256, 768):
        hessian = _hessian(width)[1]
        rows["factor"].append((0, width, _seconds(partial(_factor, hessian))))
        rows["eigen"].append((0, width, _seconds(partial(problem, hessian))))
        rows["inverse"].append((0, width, _seconds(partial(inverse, hessian))))
    single = _hessian(1024)[1].float()
    rows["factor_wide"].append((0, 1024, _seconds(partial(_factor, single))))
    rows["eigen_wide"].append((0, 1024, _seconds(partial(_eigen, single), 0.01)))
    return rows


def _factor(hessian: torch.Tensor) -> None:
    """The part of GPTQ and SparseGPT that depends on H alone."""
    act_order_factor(hessian)
    damped(hessian)


def _eigen(hessian: torch.Tensor) -> None:
    """The part of ALPS that depends on H alone, in H's dtype."""
    inverse_factor(hessian)
    torch.linalg.eigh(hessian)


@dataclass
class _Matrix:
    """A random weight [O, I] with what its solvers read."""

    weight: torch.Tensor
    statistics: InputStatistics

    def __post_init__(self) -> None:
        self.hessian = self.statistics.hessian
        self.order, whole, _ = act_order_factor(self.hessian)
        self.factor, self.held = whole.float(), damped(self.hessian)[0].float()
        self.problem = problem(self.hessian)
        self.scales = fit(self.weight, _FORMAT, self.hessian.diagonal(), None)
        self.updated = gptq(self.weight, self.factor, self.order, _FORMAT, self.scales)
        self.codes = integer_codes(self.updated, _FORMAT, self.scales, None)
        self.curvature = _hessian(len(self.weight))[1].float()

    def _judge(self, new: torch.Tensor) -> None:
        self.statistics.relative_error(self.weight, new)

    def wanda(self) -> None:
        self._judge(self.weight * keep_wanda(self.weight, self.hessian.diagonal(), 0.5))

    def sparsegpt(self) -> None:
        new, mask = sparsegpt(self.weight, self.factor, sparsity=0.5)
        self._judge(new.masked_fill(~mask, 0))

    def alps(self) -> None:
        self._judge(alps(self.weight, self.problem, kept=self.weight.numel() // 2)[0])

    def gptq(self) -> None:
        scales = fit(self.weight, _FORMAT, self.hessian.diagonal(), None)
        self._judge(gptq(self.weight, self.factor, self.order, _FORMAT, scales))

    def quantease(self) -> None:
        quantease(self.weight, self.updated, self.held, _FORMAT, self.scales, None, _ROUNDS)

    def kronecker(self) -> None:
        F = shrunk(self.curvature.clone())
        anew = gptq_kronecker(self.weight, self.factor, self.order, F, _FORMAT, self.scales, None)
        for codes in (anew, self.codes):
            kronecker_error(self.weight, codes, self.scales, self.held, F)

    def yaqa(self) -> None:
        F = shrunk(self.curvature.clone())
        yaqa(self.weight, self.codes, self.held, F, _FORMAT, self.scales, None)


def _solvers() -> dict[str, list[SizeSeconds]]:
    rows: dict[str, list[SizeSeconds]] = {}
    for outputs, inputs in ((256, 256), (1024, 256), (256, 768), (768, 768)):
        matrix = _Matrix(torch.randn(outputs, inputs) / inputs**0.5, _hessian(inputs)[0])
        for kind in ("wanda", "sparsegpt", "alps", "gptq", "quantease", "kronecker", "yaqa"):
            most = 0.01 if kind in ("alps", "kronecker", "yaqa") else 0.1
            if kind != "alps" or outputs < 1024:
                rows.setdefault(kind, []).append((outputs, inputs, _seconds(getattr(matrix, kind), most)))
    coder, columns = TrellisCoder(3, torch.device("cpu")), 8
    for outputs in (256, 1024):
        columns_CO, scales_O = torch.randn(columns, outputs), torch.ones(outputs)
        taken = _seconds(partial(coder.columns, columns_CO, scales_O), 0.01)
        rows.setdefault("trellis", []).append((outputs, columns, taken))
    return rows


def _pruning() -> dict[str, list[SizeSeconds]]:
    rows: dict[str, list[SizeSeconds]] = {"obs": [], "least_squares": []}
    for outputs, inputs in ((256, 256), (1024, 256), (256, 768)):
        weight, hessian = torch.randn(outputs, inputs), _hessian(inputs)[1]
        inverted = _seconds(partial(inverse, hessian))
        steps = inputs // 4
        pruned = _seconds(partial(obs_prune_groups, weight, hessian, steps))
        rows["obs"].append((outputs, inputs, max(pruned - inverted, pruned / 10) / steps))
        solve = partial(least_squares, weight, hessian, torch.arange(inputs - steps))
        rows["least_squares"].append((outputs, inputs, _seconds(solve)))
    return rows


def _low_rank() -> dict[str, list[SizeSeconds]]:
    rows: dict[str, list[SizeSeconds]] = {"low_rank": [], "low_rank_tall": [], "shared_matrix": []}
    for outputs, inputs in ((256, 256), (256, 768), (768, 768), (768, 256), (1024, 512)):
        weight, hessian = torch.randn(outputs, inputs), _hessian(inputs)[1]
        kind = "low_rank" if outputs <= inputs else "low_rank_tall"
        rows[kind].append((outputs, inputs, _seconds(partial(low_rank, weight, hessian, 64), 0.05)))
        two = partial(shared_matrix, [weight, weight], [hessian, hessian])
        rows["shared_matrix"].append((outputs, inputs, _seconds(two, 0.05) / 2))
    return rows


def _start() -> dict[str, list[SizeSeconds]]:
    """Tokenising, by a vocabulary of words that are drawn as often as they are in text; and a process that loads torch."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmf", k=draw.randint(1, 9))) for _ in range(20000)]
    text = " ".join(draw.choices(words, [1 / (i + 1) for i in range(len(words))], k=40000))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=4096, show_progress=False))
    encoded = _seconds(partial(tokenizer.encode_batch, [text]))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import torch, transformers.models.llama.modeling_llama"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"text": [(0, 1, encoded / len(text))], "start": [(0, 1, started)], "clock": [(0, 1, 1.0)]}


def _disk() -> dict[str, list[SizeSeconds]]:
    data = os.urandom(1 << 24)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "data"

        def there_and_back() -> None:
            path.write_bytes(data)
            hashlib.sha256(data).digest()
            hashlib.sha256(path.read_bytes()).digest()

        with path.open("w+b") as file:

            def spill() -> None:
                os.pwrite(file.fileno(), data, 0)
                os.pread(file.fileno(), len(data), 0)

            spilled = _seconds(spill) / len(data)
        small = torch.zeros(8)

        def calls() -> None:
            for _ in range(1000):
                small.add(1.0)

        return {
            "disk": [(0, 1, _seconds(there_and_back) / len(data))],
            "spill": [(0, 1, spilled)],
            "calls": [(0, 1, _seconds(calls) / 1000)],
        }
