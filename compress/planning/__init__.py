"""Plans: bytes, parameters, memory and disk of a recipe, from the headers of its model. Imports neither torch nor numpy."""

from compress.planning.make import make_plan, plan_pass
from compress.planning.plan import Plan, PlannedPass, PlannedStage
from compress.planning.sizes import Size, opened_size, planned_size, size_of, size_on_disk

__all__ = [
    "Plan",
    "PlannedPass",
    "PlannedStage",
    "Size",
    "make_plan",
    "opened_size",
    "plan_pass",
    "planned_size",
    "size_of",
    "size_on_disk",
]
