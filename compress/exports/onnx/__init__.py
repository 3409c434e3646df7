"""ONNX: causal models by the builder of onnxruntime-genai, other models by torch's exporter, with the checkpoint's codes."""
