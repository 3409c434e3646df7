"""Carve experts: each dense MLP becomes an expert that all tokens use and experts that a router chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compress.architectures.conversions.experts import carved, neurons
from compress.architectures.model_map import model_map
from compress.passes.base import Context, InputMultiple, Pass, Storage
from compress.passes.carve_experts.plan import MLP, dense_blocks, expert_sizes
from compress.passes.carve_experts.settings import CarveExpertsSettings
from compress.passes.memory import runner_memory
from compress.solvers.memory import CARVING
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint


class CarveExperts(Pass[CarveExpertsSettings]):
    """Each dense MLP becomes one expert that all tokens use and many that a linear router chooses, in stock Qwen2-MoE.

    The model keeps its bytes; each token uses a part of the neurons. So prompts and large batches take less arithmetic.
    Neurons that are hardest to do without are shared. The others are grouped by the tokens that need them, and the router
    learns which group a token needs. Every chosen expert has the same weight. `distill` after it leaves the router as it is.

    Sample recipe::

        passes:
          - carve_experts: {active: 50%, shared: 25%, experts: 16}
          - distill: {tokens: 2000000}
    """

    name: ClassVar[str] = "carve_experts"
    summary: ClassVar[str] = "Divide dense MLPs into experts, of which each token uses a few."
    settings = CarveExpertsSettings
    mode = "blockwise"
    needs = frozenset({"calibration"})
    accepts: ClassVar[frozenset[Storage]] = frozenset({"float"})
    source: ClassVar[str] = (
        "CMoE, arXiv 2502.04416; shared neurons by Optimal Brain Surgeon; block reconstruction: arXiv 2102.05426"
    )

    def followed_by(self, settings: CarveExpertsSettings, later: InputMultiple) -> CarveExpertsSettings:
        """Choose the multiple that later passes need, where none is given."""
        unset = settings.multiple_of is None and later.needed > 1
        return settings.model_copy(update={"multiple_of": later.needed}) if unset else settings

    def depends_on_effort(self, settings: CarveExpertsSettings) -> bool:
        """Where blocks are tuned, or could be with another effort."""
        return settings.repair == "tune" or "repair" not in settings.model_fields_set

    def plan(self, spec: Spec, settings: CarveExpertsSettings) -> Spec:
        """Exact: sizes do not depend on data."""
        model_map(spec).require_one_list("leave the pass out")
        sizes = expert_sizes(spec, settings)
        return carved(spec, sizes, dense_blocks(spec, settings))

    def memory(self, spec: Spec, settings: CarveExpertsSettings, width: int) -> int:
        """Bytes of the block runner."""
        mapped, tuned = model_map(spec), settings.repair == "tune"
        names = {x.name for x in mapped.layers if len(x.tensor.shape) == 2 and (tuned or x.part in MLP)}
        return runner_memory(spec, names, width, CARVING, reconstruction="floats" if tuned else None)

    def plan_notes(self, spec: Spec, settings: CarveExpertsSettings) -> list[str]:
        """The neurons that a token uses."""
        total, sizes = neurons(spec), expert_sizes(spec, settings)
        return [
            f"a token uses {sizes.used} of the {total} neurons of an MLP ({sizes.used / total:.0%}): {sizes.shared} shared, "
            f"and {sizes.active} of {sizes.count} experts of {sizes.size}",
            "compare with `prune_structured: {mlp: …}` of as many active neurons, which also saves the bytes",
        ]

    def apply(self, checkpoint: Checkpoint, settings: CarveExpertsSettings, context: Context) -> Checkpoint:
        """Solve block by block here; the result reads the solved tensors from the workspace."""
        from compress.passes.carve_experts.convert import convert

        self.plan(checkpoint.spec, settings)
        return convert(checkpoint, settings, context)
