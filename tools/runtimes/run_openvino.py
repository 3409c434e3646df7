"""OpenVINO: logits of a folder of `compress export --to onnx`.

python run_openvino.py FOLDER IDS.json OUT.npz
"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino

folder, source, target = sys.argv[1:]
asked = json.loads(Path(source).read_text())
OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}  # by default inputs are rounded
core = openvino.Core()
model = core.read_model(f"{folder}/onnx/model.onnx")
compiled = core.compile_model(model, "CPU", OPTIONS)
ids = np.array([asked["ids"]], np.int64)
inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
config = Path(folder, "genai_config.json")
size = json.loads(config.read_text())["model"]["decoder"]["head_size"] if config.is_file() else 0
for each in compiled.inputs:
    name = each.get_any_name()
    if name.startswith("past_key_values"):
        inputs[name] = np.zeros((1, each.get_partial_shape()[1].get_length(), 0, size), np.float32)
known = {name for each in compiled.inputs for name in each.get_names()}
result = compiled({name: value for name, value in inputs.items() if name in known})
np.savez(target, logits=result[compiled.output(0)][0], version=openvino.__version__.split("-")[0])
