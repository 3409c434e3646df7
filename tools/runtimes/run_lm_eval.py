"""lm-eval on checkpoint folders: bits per byte of some lines, as a task of its own.

python run_lm_eval.py ASKED.json FOLDER OUT.npz [FOLDER OUT.npz …]
"""

import json
from importlib.metadata import version
from pathlib import Path

import transformers
from each import each
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from stock import load

#: Reads the names of all tasks once. `simple_evaluate` would, for each model, and ask pip for the versions of packages.
TASKS = TaskManager()


def outputs(folder, asked):
    """``bits_per_byte``, each line after the token that ends a text."""
    file = Path("lines.jsonl").resolve()
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in asked["lines"]))
    task = {
        "task": "lines",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
        "num_fewshot": 0,
    }
    model = load(folder, True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = HFLM(model, tokenizer=tokenizer, batch_size=1)
    scored = evaluate(model, TASKS.load([task]), log_samples=False, bootstrap_iters=0)
    return {"bits_per_byte": scored["results"]["lines"]["bits_per_byte,none"], "version": version("lm-eval")}


each(outputs)
