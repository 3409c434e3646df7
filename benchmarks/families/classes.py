"""Classes of transformers' mappings that the matrix has."""

from __future__ import annotations

from dataclasses import dataclass

#: Kind of class ▶ its mapping in transformers' ``modeling_auto``, in the order in which they are run.
KINDS = {
    "causal LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "sequence classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "image classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "speech to text": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "speech CTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "audio classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}
CAUSAL = "causal LM"


@dataclass(frozen=True)
class Subject:
    """A class of a model type; ``kinds`` are those whose mappings list it."""

    model_type: str
    class_name: str
    kinds: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its folder of results."""
        return f"{self.model_type}--{self.class_name}"


def subjects() -> list[Subject]:
    """Every pair of model type and class in the mappings, once, in the order of `KINDS`."""
    from transformers.models.auto import modeling_auto

    kinds: dict[tuple[str, str], list[str]] = {}
    for kind, mapping in KINDS.items():
        for model_type, listed in getattr(modeling_auto, mapping).items():
            for class_name in (listed,) if isinstance(listed, str) else listed:
                kinds.setdefault((model_type, class_name), []).append(kind)
    return [Subject(*pair, tuple(of)) for pair, of in kinds.items()]
