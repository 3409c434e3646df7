"""Memory of each solver beside Hessians and weights, for plans. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Weights that a solver works on at a time, where it keeps several floats of each; larger matrices are split by outputs.
WEIGHTS_AT_ONCE = 1 << 24


def outputs_at_once(outputs: int, inputs: int) -> int:
    """Number of outputs in a part of a matrix, of equal parts that have at most `WEIGHTS_AT_ONCE` weights each."""
    count = -(-outputs // max(1, WEIGHTS_AT_ONCE // max(1, inputs)))
    return max(1, -(-outputs // max(1, count)))


def parts_of(W_OI: torch.Tensor) -> Iterator[slice]:
    """The parts of a matrix, as runs of outputs; see `outputs_at_once`."""
    outputs, inputs = W_OI.shape
    size = outputs_at_once(outputs, inputs)
    for start in range(0, outputs, size):
        yield slice(start, min(start + size, outputs))


@dataclass(frozen=True)
class SolverMemory:
    """Memory that a solver takes for one matrix [O, I].

    Attributes:
        hessians: number of matrices [I, I] in the dtype of the Hessian, beside the Hessian itself.
        weights: number of float32 matrices [O, I].
        kept: bytes per weight of the block that stay until the whole block is solved.
        in_parts: a step on parts of a large matrix (`parts_of`): ``hessians``, ``weights``, and number of float32 matrices of
            a part.
    """

    hessians: float
    weights: float
    kept: float
    in_parts: tuple[float, float, int] | None = None

    def peak(self, hessian: int, outputs: int, inputs: int) -> int:
        """Bytes of the Hessian and all beside it, for one matrix; ``hessian``: bytes of the Hessian."""
        count = outputs * inputs
        whole = int((1 + self.hessians) * hessian) + int(4 * self.weights * count)
        if self.in_parts is None:
            return whole
        hessians, weights, floats = self.in_parts
        part = outputs_at_once(outputs, inputs) * inputs
        return max(whole, int((1 + hessians) * hessian) + int(4 * weights * count) + 4 * floats * part)


#: A run that reads activations only.
NO_SOLVER = SolverMemory(hessians=0, weights=0, kept=0)
#: Rounding on trial, without inputs.
ROUNDED = SolverMemory(hessians=-1, weights=6, kept=0)
#: Pruning: the inverse factor of the Hessian (SparseGPT), or the scaled Hessian and its inverse (ALPS). Masks are kept.
WANDA = SolverMemory(hessians=0, weights=4, kept=1)
SPARSEGPT = SolverMemory(hessians=1, weights=4, kept=1)
ALPS = SolverMemory(hessians=2, weights=6, kept=1, in_parts=(1, 2.5, 12))
#: Pruning of units: H⁻¹ and H among the remaining units; with biases also the Hessian less the products of the means.
OBS = SolverMemory(hessians=1.2, weights=4, kept=0)
OBS_WITH_BIAS = SolverMemory(hessians=2.2, weights=4, kept=0)
#: Quantisation: the Hessian's factor. Codes are kept in two bytes, those of integers below 8 bits in one.
GPTQ = SolverMemory(hessians=1, weights=5, kept=2.1, in_parts=(1, 2, 11))
#: GPTQ towards the original's outputs: also the input mismatch. Then QuantEase and YAQA, on parts of large matrices, with the
#: feedback of errors.
GPTQ_CORRECTED = SolverMemory(hessians=2, weights=5, kept=2.1, in_parts=(2, 1.25, 10))
#: Trellis codes: the rotated Hessian, damped, and the factors of both. States are kept.
TRELLIS = SolverMemory(hessians=5, weights=8, kept=2.1)
#: Codebooks by weighted k-means and GPTQ, towards the original's outputs. Codes are kept as bytes.
CODEBOOK = SolverMemory(hessians=1, weights=6, kept=1.1, in_parts=(2, 1.25, 10))
#: Low-rank factors: towards the original's outputs on parts, then the eigenvectors of a product in float64. Factors are kept.
LOW_RANK = SolverMemory(hessians=0, weights=8, kept=4, in_parts=(2, 1.25, 6))
#: One matrix for a group of blocks, whose Hessians and weights are read one by one: their sum, its factor, and two copies.
SHARED_MATRIX = SolverMemory(hessians=3, weights=6, kept=0)
#: Matrices of the likeness of units of two blocks, float64.
MATCHED = 2
#: Bytes for each number of an embedding table: tables in two bytes and the new one; or in float64, three at a time.
TIED_TABLES, THIN_TABLES = 12, 28
#: Neurons carved into experts: sums of two products of activations, and the factor of one.
CARVING = SolverMemory(hessians=2, weights=5, kept=0)
#: Bytes of a neuron's activity on the tokens that experts are chosen by, for all neurons of an MLP together.
ENERGY_BYTES = 256 << 20
#: Latent attention: moments of the inputs in float64, where Hessians are in float32; then so many float64 matrices of the
#: projections and what is made of them, without a block in memory.
LATENT = SolverMemory(hessians=12, weights=0, kept=0)
SOLVED_LATENT = 20
