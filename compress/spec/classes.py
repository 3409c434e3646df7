"""Kinds of transformers classes by the suffix of their names, and the auto class of each kind. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClassKind:
    """One kind of model with a head.

    Attributes:
        suffixes: suffixes of the class names, the usual one first.
        auto: the auto class that loads it.
    """

    suffixes: tuple[str, ...]
    auto: str


CAUSAL_LM = ClassKind(("ForCausalLM", "LMHeadModel"), "AutoModelForCausalLM")
MASKED_LM = ClassKind(("ForMaskedLM",), "AutoModelForMaskedLM")
SEQUENCE_CLASSIFICATION = ClassKind(("ForSequenceClassification",), "AutoModelForSequenceClassification")
TOKEN_CLASSIFICATION = ClassKind(("ForTokenClassification",), "AutoModelForTokenClassification")
QUESTION_ANSWERING = ClassKind(("ForQuestionAnswering",), "AutoModelForQuestionAnswering")
IMAGE_CLASSIFICATION = ClassKind(
    ("ForImageClassification", "ForImageClassificationWithTeacher"), "AutoModelForImageClassification"
)
SEQ2SEQ_LM = ClassKind(("ForConditionalGeneration",), "AutoModelForSeq2SeqLM")
#: Kinds that compact checkpoints support, besides base models.
KINDS = (
    CAUSAL_LM,
    MASKED_LM,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    QUESTION_ANSWERING,
    IMAGE_CLASSIFICATION,
    SEQ2SEQ_LM,
)


def auto_class(class_name: str | None) -> str:
    """Name of the auto class that loads a class; ``AutoModel`` for a base model, or without a name."""
    return next((kind.auto for kind in KINDS if (class_name or "").endswith(kind.suffixes)), "AutoModel")


def suffix_of(auto: str) -> str:
    """Usual suffix of the classes of an auto class; empty for ``AutoModel``."""
    return next((kind.suffixes[0] for kind in KINDS if kind.auto == auto), auto.removeprefix("AutoModel"))
