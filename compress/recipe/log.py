"""Where else the figures of a run go: `log` of a recipe."""

from __future__ import annotations

from pydantic import Field

from compress.recipe.data import Text
from compress.settings import Settings


class Log(Settings):
    """Trackers that get the figures of a finished run, its settings, `report.html` and `report.json`."""

    mlflow: Text | None = Field(
        default=None,
        description="Experiment of MLflow. `MLFLOW_TRACKING_URI` names the server; without it a database here takes them.",
    )
    wandb: Text | None = Field(
        default=None,
        description="Project of Weights & Biases. `WANDB_MODE=offline` keeps the figures in the run folder until "
        "`wandb sync`.",
    )
