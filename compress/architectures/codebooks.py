"""Models that read several rows of token ids as one sample: a row for each codebook of a sound. No torch here."""

from __future__ import annotations

from compress.errors import PassError
from compress.spec.spec import Spec

#: Model types whose ``input_ids`` are [samples x codebooks, tokens] ▶ number of codebooks where the config has none.
_CODEBOOKS = {"musicgen_decoder": 4, "musicgen_melody_decoder": 4}


def rows_per_sample(spec: Spec, rows: int) -> int:
    """Number of rows of token ids that make one sample of a model.

    Args:
        rows: number of rows there are.

    Raises:
        PassError: the rows make no whole number of samples.
    """
    default = _CODEBOOKS.get(spec.structure.model_type)
    if default is None:
        return 1
    count = int(spec.structure.config.get("num_codebooks") or default)
    if rows % count:
        raise PassError(
            f"{rows} rows of token ids make no whole number of samples: {spec.structure.model_type} reads one row for each of"
            f" its {count} codebooks",
            fix=f"give a multiple of {count} rows",
        )
    return count
