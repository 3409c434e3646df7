"""sentence-transformers with its ONNX backend: embeddings of lines by folders of `compress export --to onnx`.

python run_sentence_transformers.py ASKED.json FOLDER OUT.npz [FOLDER OUT.npz …]
"""

import sentence_transformers
from each import each


def outputs(folder, asked):
    """``embeddings`` [lines, width], unit vectors."""
    model = sentence_transformers.SentenceTransformer(folder, backend="onnx", local_files_only=True)
    vectors = model.encode(asked["lines"], normalize_embeddings=True, batch_size=1)
    return {"embeddings": vectors, "version": sentence_transformers.__version__}


each(outputs)
