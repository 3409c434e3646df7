"""OpenVINO: logits of folders of `compress export --to onnx`.

python run_openvino.py ASKED.json FOLDER OUT.npz [FOLDER OUT.npz …]
"""

import json
from pathlib import Path

import numpy as np
import openvino
from each import each

OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}  # by default inputs are rounded


def outputs(folder, asked):
    """``logits`` [tokens, vocabulary], or of an encoder its hidden states."""
    compiled = openvino.Core().compile_model(f"{folder}/onnx/model.onnx", "CPU", OPTIONS)
    ids = np.array([asked["ids"]], np.int64)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    config = Path(folder, "genai_config.json")
    size = json.loads(config.read_text())["model"]["decoder"]["head_size"] if config.is_file() else 0
    for port in compiled.inputs:
        name = port.get_any_name()
        if name.startswith("past_key_values"):
            inputs[name] = np.zeros((1, port.get_partial_shape()[1].get_length(), 0, size), np.float32)
    known = {name for port in compiled.inputs for name in port.get_names()}
    result = compiled({name: value for name, value in inputs.items() if name in known})
    return {"logits": result[compiled.output(0)][0], "version": openvino.__version__.split("-")[0]}


each(outputs)
