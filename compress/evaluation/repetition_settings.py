"""Settings of the metric `repetition`. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from compress.errors import CompressError
from compress.settings import Settings

#: Tokens of the passage, if half of the window holds as many.
_PASSAGE = 128


def _ascending(distances: tuple[int, ...]) -> tuple[int, ...]:
    if twice := [each for i, each in enumerate(distances) if each in distances[:i]]:
        raise ValueError(f"the distance {twice[0]} is named twice")
    return tuple(sorted(distances))


Distance = Annotated[int, Field(ge=2, le=2**31)]


class RepetitionSettings(Settings):
    """Distances at which a passage comes again."""

    distances: Annotated[tuple[Distance, ...], Field(min_length=1), AfterValidator(_ascending)] | None = Field(
        default=None,
        description="Tokens from the beginning of a passage to the beginning of its repetition, other text between. By default "
        "the powers of two at which both fit into the `window` of `data.evaluation`.",
    )
    passage: int | None = Field(
        default=None,
        ge=2,
        le=2**31,
        description=f"Tokens of the passage, by default {_PASSAGE}, or less where a distance or half of the window is shorter.",
    )
    samples: int = Field(default=16, ge=1, le=2**20, description="Number of passages, spread over the evaluation text.")

    @model_validator(mode="after")
    def _apart(self) -> RepetitionSettings:
        if self.distances and self.passage and self.distances[0] < self.passage:
            raise ValueError(
                f"a passage of {self.passage} tokens would not end within a distance of {self.distances[0]}"
            )
        return self

    def fitted(self, window: int) -> tuple[int, tuple[int, ...]]:
        """Tokens of the passage, and the distances, for windows of that many tokens.

        Raises:
            CompressError: no distance is given, and the window does not hold the passage twice.
        """
        passage = self.passage or min(_PASSAGE, window // 2, *(self.distances or ()))
        fitting = (1 << power for power in range(1, (window - passage).bit_length()))
        distances = self.distances or tuple(distance for distance in fitting if distance >= passage)
        if passage < 2 or not distances:
            raise CompressError(
                f"a passage of {max(passage, 2)} tokens does not come twice at a power of two in a window of {window}",
                fix="name `distances`, or a longer window",
            )
        return passage, distances
