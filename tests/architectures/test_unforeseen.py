from __future__ import annotations

import pytest
import torch
import transformers

from compress.architectures.unforeseen import refused
from compress.errors import PassError
from compress.spec.spec import Spec, Structure, Tensor


def spec(model_type, class_name):
    config = {"model_type": model_type, "architectures": [class_name], "num_hidden_layers": 1}
    return Spec(Structure(config), {"lm_head.weight": Tensor("lm_head.weight", (8, 4), "F32")})


def test_errors_of_models_without_a_written_record_are_refusals():
    with (
        pytest.raises(
            PassError, match=r"^cast meets what the inferred record of ReformerModelWithLMHead .*KeyError: 'a'\)"
        ) as caught,
        refused(spec("reformer", "ReformerModelWithLMHead"), "cast"),
    ):
        raise KeyError("a")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(("model_type", "error"), [("llama", KeyError("a")), ("reformer", MemoryError())])
def test_faults_and_lacks_of_memory_are_not_refused(model_type, error):
    with pytest.raises(type(error)), refused(spec(model_type, None), "cast"):
        raise error


def test_what_a_class_itself_raises_is_refused_where_asked():
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)  # its config lacks the token that decoders begin with
    t5 = spec("t5", "T5ForConditionalGeneration")
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(PassError, match="the evaluation fails in T5ForConditionalGeneration itself"):  # noqa: SIM117
        with refused(t5, "the evaluation", of_class=True):
            model(input_ids=ids, labels=ids)
