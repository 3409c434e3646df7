"""The modelling file that compact checkpoints carry, and the ``auto_map`` that points to it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

FILE_NAME = "modeling_compress.py"
CLASS_NAME = "CompressModel"
_HERE = Path(__file__).parent
_IMPORT = "from compress.checkpoint.decode import decode, part_names\n"
#: Suffix of a stock class ▶ the auto class that loads it. `modeling` has one class for each, called Compress<suffix>.
_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}


@cache
def source() -> bytes:
    """Text of the bundled file: `decode` and `modeling` in one, so that it needs torch and transformers alone."""
    decode = (_HERE / "decode.py").read_text(encoding="utf-8")
    modeling = (_HERE / "modeling.py").read_text(encoding="utf-8")
    head, found, tail = modeling.partition(_IMPORT)
    assert found, "modeling.py must import decode in one line"
    body = decode.partition("import torch\n")[2].strip("\n")
    return f"{head.rstrip()}\n\n\n# ---- storage chains ----\n\n{body}\n\n\n# ---- loading ----\n\n{tail.lstrip()}".encode()


def auto_class(class_name: str | None) -> str:
    """Name of the auto class that loads the stock class ``class_name``; ``AutoModel`` for a base model."""
    return next((auto for suffix, auto in _AUTO.items() if (class_name or "").endswith(suffix)), "AutoModel")


def auto_map(class_name: str | None) -> dict[str, str]:
    """``auto_map`` of a compact checkpoint whose stock class is ``class_name``."""
    module = FILE_NAME.removesuffix(".py")
    result = {"AutoConfig": f"{module}.CompressConfig", "AutoModel": f"{module}.CompressModel"}
    auto = auto_class(class_name)
    return result | {auto: f"{module}.{auto.replace('AutoModel', 'Compress')}"} if auto != "AutoModel" else result
