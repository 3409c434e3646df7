"""Settings of the metric `lm_eval`. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from compress.settings import Settings, distinct


class LmEvalSettings(Settings):
    """Tasks of lm-eval (EleutherAI's lm-evaluation-harness), measured in a process of its own."""

    tasks: Annotated[tuple[str, ...], AfterValidator(distinct)] = Field(
        default=(), description="Names of its tasks, or paths of YAML files of your own, which end in .yaml."
    )
    limit: int | None = Field(default=None, ge=1, description="Only the first so many documents of each task.")
    shots: int | None = Field(
        default=None, ge=0, description="Examples before each document. By default the task's own."
    )
    batch_size: int = Field(default=1, ge=1, description="Documents at a time.")
    chat_template: bool = Field(default=False, description="Ask by the chat template of the tokenizer.")
