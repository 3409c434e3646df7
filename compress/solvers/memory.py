"""Memory of each solver beside Hessians and weights, for plans. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SolverMemory:
    """Memory that a solver takes for one matrix [O, I].

    Attributes:
        hessians: number of matrices [I, I] in the dtype of the Hessian, beside the Hessian itself.
        weights: number of float32 matrices [O, I].
        kept: bytes per weight of the block that stay until the whole block is solved.
    """

    hessians: float
    weights: int
    kept: float


#: A run that reads activations only.
NO_SOLVER = SolverMemory(hessians=0, weights=0, kept=0)
#: Pruning: the inverse factor of the Hessian (SparseGPT), or its eigenvectors and their products (ALPS). Masks are kept.
WANDA = SolverMemory(hessians=0, weights=4, kept=1)
SPARSEGPT = SolverMemory(hessians=1, weights=4, kept=1)
ALPS = SolverMemory(hessians=4, weights=10, kept=1)
#: Pruning of units: H⁻¹ and H among the remaining units; with biases also the Hessian less the products of the means.
OBS = SolverMemory(hessians=1.2, weights=4, kept=0)
OBS_WITH_BIAS = SolverMemory(hessians=2.2, weights=4, kept=0)
#: Quantisation: the Hessian's factor and a damped copy. Codes are kept as floats.
GPTQ = SolverMemory(hessians=2, weights=4, kept=4)
#: GPTQ towards the original's outputs, then QuantEase and YAQA: also the input mismatch, and each matrix before and after.
GPTQ_CORRECTED = SolverMemory(hessians=4, weights=13, kept=12)
#: Codebooks by weighted k-means and GPTQ. Codes are kept as floats and bytes.
CODEBOOK = SolverMemory(hessians=4, weights=8, kept=5)
#: Low-rank factors: the Hessian's eigenvectors and roots. Factors are kept.
LOW_RANK = SolverMemory(hessians=6, weights=8, kept=4)
#: One matrix for a group of blocks.
SHARED_MATRIX = SolverMemory(hessians=4, weights=12, kept=0)
#: Neurons carved into experts: H⁻¹, and two products of activations, with a copy for the solution.
CARVING = SolverMemory(hessians=4, weights=4, kept=0)
#: Bytes of a neuron's activity on the tokens that experts are chosen by, for all neurons of an MLP together.
ENERGY_BYTES = 256 << 20
#: Latent attention: three moments of the inputs, and the projections in float64.
LATENT = SolverMemory(hessians=4, weights=8, kept=0)
