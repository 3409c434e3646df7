"""Loss that distillation wins back, and its time and memory.

`make bench-distill [MODEL= TRAIN= HELDOUT=]`, sections of docs/benchmarks.md.

Blocks and neurons go from a model, then it is trained on TOKENS tokens of TRAIN text: under the original, on hard labels alone,
and under a cache of the original's k likeliest tokens. Scores are those of benchmarks/scoring.py.
With --jobs memory also the memory of a step at vocabularies of 4 and 128 thousand, by micro-batches and
checkpointing, beside a plain implementation; with speed the time of steps beside a plain loop's; with classifier what a student
of half the blocks keeps of a text classifier's accuracy; with ensemble what two teachers are worth beside one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page, scoring  # noqa: E402

WAYS: dict[str, dict[str, Any]] = {
    "hard labels": {"losses": {"labels": 1.0}},
    "distilled (default)": {},
    "distilled, cache of k = 64": {"teacher_cache": {"top_k": 64}},
}
#: of the section, by its first job
TITLES = {
    "quality": "Distilling {model}",
    "ensemble": "Distilling under two teachers",
    "classifier": "Distilling a classifier",
}
#: vocabulary, way, what differs from a batch of 8 at once
MEMORY: tuple[tuple[int, str, dict[str, Any]], ...] = (
    (4096, "plain", {}),
    (131072, "plain", {}),
    (4096, "ours", {}),
    (131072, "ours", {}),
    (4096, "ours, micro-batches of 2", {"micro": 2}),
    (4096, "ours, micro-batches of 2, checkpointing", {"micro": 2, "checkpointing": True}),
)


def quality(args: argparse.Namespace, scratch: Path) -> list[str]:
    """Held-out loss before and after training, each way with the same student, samples, steps and schedule."""
    import compress

    texts = scoring.held_out(args)
    cut = {key: value for key, value in (("layers", args.layers), ("mlp", args.mlp)) if value}
    data = args.calibration or args.train
    ids = {"data": data, "samples": args.samples, "length": 256, "document_separator": "<|doc|>"}
    named = args.calibration is not None and args.calibration.partition(":")
    if named:
        ids = {"data": named[0], "field": named[2]}
    simple = {"importance": "activation", "layer_importance": "block_influence", "compensation": "none"}
    for name, how in (("bare", simple), ("student", {"effort": args.effort})):
        if not (scratch / name).exists():
            compress.apply("prune_structured", args.model, scratch / name, **ids, **cut, **how)
    bare, start = (texts.score(scratch / name) for name in ("bare", "student"))
    lost = texts.rise(bare)
    rows = [["removed, no repair", *texts.cells([bare]), "", "", ""]]
    rows.append(
        [f"prune_structured, {args.effort}", *texts.cells([start]), f"{1 - texts.rise(start) / lost:.0%}", "", ""]
    )
    print(rows, flush=True)
    for way in args.ways:
        settings = dict(WAYS[way])
        if "teacher_cache" in settings:
            settings["teacher_cache"] = {**settings["teacher_cache"], "folder": str(scratch / "cache")}
        out = scratch / way.replace(" ", "-")
        shutil.rmtree(out, ignore_errors=True)
        details: dict[str, Any] = {}
        begun = time.perf_counter()
        compress.apply(
            "distill", scratch / "student", out, data=args.train, document_separator="<|doc|>",
            teacher=args.model, tokens=args.tokens, autocast=args.autocast, details=details, **settings,
        )  # fmt: skip
        seconds = f"{time.perf_counter() - begun:.0f}"
        scores = texts.score(out)
        training = details["training"]
        per_token = training.get("teacher_cache", {}).get("bytes_per_token")
        rows.append(
            [
                way,
                *texts.cells([scores]),
                f"{1 - texts.rise(scores) / lost:.0%}",
                f"{training['held_out'][-1]['loss']:.4f}",
                seconds + (f", {per_token} bytes per token" if per_token else ""),
            ]
        )
        print(*rows[-1], flush=True)
    cast = " and autocast" * bool(args.autocast)
    removed = [f"{args.layers} of the blocks"] * bool(args.layers) + [f"{args.mlp:.0%} of the neurons"] * bool(args.mlp)
    return [
        f"{' and '.join(removed)} of {page.model_name(args.model)} are removed. The student "
        f"then trains on {args.tokens:,} tokens of {', '.join(Path(f).name for f in args.train)} with the defaults of the "
        f"pass, except for the losses named{cast}. {texts.note()} "
        "Won back: share of the loss that removal alone costs. Seconds cover the whole call.",
        "",
        *page.table(["", *scoring.COLUMNS, "won back", "last held-out loss in training", "seconds"], rows),
    ]


def classifier(args: argparse.Namespace, scratch: Path) -> list[str]:
    """A BERT of 6 blocks trained on labels, and students of 3: under it, and on labels alone, with the same samples."""
    import compress
    from examples.train_tiny_classifier import make_tokenizer

    train, test = args.labelled
    texts = [line.partition("\t")[0] for line in Path(train).read_text(encoding="utf-8").splitlines()[1:]]
    tokenizer = make_tokenizer(texts)
    fresh = scratch / "fresh"
    _bert(len(tokenizer)).save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    data = {"data": train, "text": "sentence", "label": "label", "length": 48}
    how = {
        "batch_size": 64,
        "epochs": args.epochs,
        "schedule": "linear",
        "learning_rate": 1e-3,
        "validation_samples": 256,
    }
    compress.apply("distill", fresh, scratch / "six", losses={"labels": 1.0}, weight_decay=0.05, **how, **data)
    rows = []
    reference = _accuracy(scratch / "six", test)
    rows.append(["6 blocks, labels", f"{reference:.2%}", ""])
    print(*rows[-1], flush=True)
    student = {"layers": 3, "from": "every_second"}
    for name, losses in (
        ("3 blocks, labels", {"labels": 1.0}),
        ("3 blocks, distilled", {"kl": 1.0, "labels": 0.5, "hidden": 0.1}),
    ):
        out = scratch / name.replace(" ", "-")
        compress.apply(
            "distill", scratch / "six", out, student=student, losses=losses, weight_decay=0.05, **how, **data
        )
        found = _accuracy(out, test)
        rows.append([name, f"{found:.2%}", f"{found / reference:.1%}"])
        print(*rows[-1], flush=True)
    return [
        f"A BERT of width 128 from random weights, {len(texts):,} labelled texts of {Path(train).name}, "
        f"{args.epochs:g} epochs; accuracy on {Path(test).name}.",
        "",
        *page.table(["", "accuracy", "of the teacher's"], rows),
    ]


def ensemble(args: argparse.Namespace, scratch: Path) -> list[str]:
    """Two small models trained on labels, which differ in their random weights alone, and students of their size under them."""
    import compress

    texts = [scoring.token_windows(args.model, file, args.windows)[0] for file in args.heldout]
    data = {
        "data": args.train,
        "document_separator": "<|doc|>",
        "tokens": args.tokens,
        "learning_rate": 2e-3,
        "schedule": "cosine",
    }
    rows = []

    def train(name: str, seed: int, what: str, **settings: Any) -> Path:
        _llama(args.model, seed, scratch / f"fresh{seed}")
        out = scratch / name
        shutil.rmtree(out, ignore_errors=True)
        compress.apply("distill", scratch / f"fresh{seed}", out, **data, **settings)
        rows.append([what, f"{scoring.mean_loss(out, texts):.4f}"])
        print(*rows[-1], flush=True)
        return out

    teachers = [train(f"teacher{i}", i, f"teacher {i}, labels", losses={"labels": 1.0}) for i in (1, 2)]
    train("labels", 3, "student, labels", losses={"labels": 1.0})
    for number, teacher in enumerate(teachers, 1):
        train(f"under{number}", 3, f"student under teacher {number}", teacher=str(teacher))
    train("under-both", 3, "student under both", teacher=[{"checkpoint": str(teacher)} for teacher in teachers])
    return [
        f"Llamas of width 128 and 2 blocks from random weights, with the tokenizer of {Path(args.model).name}; "
        f"{args.tokens:,} tokens of {', '.join(Path(f).name for f in args.train)} each, the same ones; students of the same "
        f"size. Held-out loss, nats per token, on {', '.join(Path(f).name for f in args.heldout)}.",
        "",
        *page.table(["", "loss"], rows),
    ]


def _llama(tokenizer: str, seed: int, folder: Path) -> None:
    import torch
    import transformers

    if folder.exists():
        return
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=128, num_hidden_layers=2, intermediate_size=352, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


def _bert(vocabulary: int) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=vocabulary, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
            max_position_embeddings=64, num_labels=2,
        )
    )  # fmt: skip


def _accuracy(folder: Path, test: str) -> float:
    from compress.checkpoint.open import open_checkpoint
    from compress.data.examples import read_examples
    from compress.evaluation.classification import classify_documents
    from compress.evaluation.scorer import labels_of
    from compress.models.loading import load_model
    from compress.models.processors import load_tokenizer

    documents = read_examples([test], ["sentence"], labels_of(open_checkpoint(folder).spec.structure, "label"))
    found = classify_documents(load_model(folder), load_tokenizer(folder), documents, labels=["LABEL_0", "LABEL_1"])
    return float(found.to_dict()["accuracy"])


def memory() -> list[str]:
    """Peak memory of a step beyond what models, gradients and optimizer hold, each in a process of its own."""
    rows = []
    for vocabulary, way, how in MEMORY:
        job = json.dumps({"vocabulary": vocabulary, "plain": way == "plain", **how})
        done = subprocess.run([sys.executable, __file__, "--one", job], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append([f"{vocabulary:,}", way, f"{found['held']:,}", f"{found['peak']:,}", f"{found['seconds']:.2f}"])
        print(*rows[-1], flush=True)
    return [
        "Random Llamas of width 256, 4 blocks (student) and 6 (teacher), untied head, 8 × 256 tokens, AdamW, KL: MiB held by "
        "weights, gradients and optimizer state, and what a step takes beyond that at its peak.",
        "",
        *page.table(["vocabulary", "", "held, MiB", "beyond, MiB", "seconds"], rows),
    ]


def one(job: dict[str, Any]) -> None:
    """A step's peak memory, printed as JSON."""
    import torch

    objective, says, batch_of, optimizers = _models(job["vocabulary"], job.get("checkpointing", False))
    step = _plain if job["plain"] else _ours

    def run(samples: int) -> None:
        step(objective, says, batch_of, samples, job.get("micro") or samples)
        for optimizer in optimizers:
            optimizer.step()

    run(1)  # gradients and optimizer state are there from now on
    held = _resident()
    for optimizer in optimizers:
        optimizer.zero_grad()
    _resident()
    Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
    begun = time.perf_counter()
    with torch.enable_grad():
        run(8)
    seconds = time.perf_counter() - begun
    peak = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")).split()[1])
    print(json.dumps({"held": held >> 10, "peak": (peak - held) >> 10, "seconds": seconds}))


def _resident() -> int:
    """KiB."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS")).split()[1])


def _models(vocabulary: int, checkpointing: bool) -> tuple[Any, Any, Any, Any]:
    import torch
    import transformers

    from compress.data.batches import Batches
    from compress.evaluation.tasks import LANGUAGE
    from compress.training.data import Samples
    from compress.training.objective import Objective, Terms
    from compress.training.optimize import Update, optimizers
    from compress.training.teachers import Teachers, frozen_teacher

    def make(depth: int) -> Any:
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=vocabulary, hidden_size=256, intermediate_size=704, num_hidden_layers=depth,
                num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False,
            )
        )  # fmt: skip

    torch.manual_seed(0)
    student, teacher = make(4), make(6)
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student.train()
    terms = Terms({"kl": 1.0})
    objective = Objective(student, LANGUAGE, terms, vocabulary=vocabulary)
    reader = frozen_teacher(teacher, LANGUAGE, terms)
    samples = Samples(Batches(torch.randint(0, vocabulary, (8, 256))), LANGUAGE, 0)
    probe = samples.batch([(0, 0)], (1, 1), "cpu").inputs
    objective.features.check({k: v[:, :8] for k, v in probe.items()})
    reader.check({k: v[:, :8] for k, v in probe.items()})
    taken = [(i, 0) for i in range(8)]

    def batch_of(rows: slice, of: int) -> Any:
        return samples.batch(taken[rows], samples.counts(taken[:of]), "cpu")

    tables = [student.get_input_embeddings().weight, student.get_output_embeddings().weight]
    return objective, Teachers([reader], [1.0], terms, vocabulary), batch_of, optimizers(objective, tables, Update())


def _ours(objective: Any, says: Any, batch_of: Any, samples: int, micro: int) -> None:
    for begin in range(0, samples, micro):
        batch = batch_of(slice(begin, begin + micro), samples)
        objective(batch, says(batch))[0].backward()


def _plain(objective: Any, says: Any, batch_of: Any, samples: int, micro: int) -> None:
    """As loops are commonly written: all logits of student and teacher."""
    import torch

    batch = batch_of(slice(0, samples), samples)
    inputs = {"input_ids": batch.inputs["input_ids"], "use_cache": False}
    with torch.no_grad():
        theirs = says.models[0].model(**inputs).logits[:, :-1].float().log_softmax(-1)
    mine = objective.student(**inputs).logits[:, :-1].float().log_softmax(-1)
    kl = torch.nn.functional.kl_div(mine.flatten(0, 1), theirs.flatten(0, 1), log_target=True, reduction="batchmean")
    kl.backward()


def speed() -> list[str]:
    """CPU time of steps, in turns with a plain loop's that does the same passes."""
    rows = []
    for vocabulary in (4096, 32768):
        objective, says, batch_of, optimizers = _models(vocabulary, False)
        found: dict[str, list[float]] = {"ours": [], "plain": []}
        for turn in range(6):
            for name, step in (("ours", _ours), ("plain", _plain)):
                begun = time.process_time()
                step(objective, says, batch_of, 8, 8)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                if turn:
                    found[name].append(time.process_time() - begun)
        ours, plain = (statistics.median(found[name]) for name in ("ours", "plain"))
        rows.append([f"{vocabulary:,}", f"{8 * 256 / ours:,.0f}", f"{8 * 256 / plain:,.0f}", f"{plain / ours:.2f} ×"])
        print(*rows[-1], flush=True)
    return [
        "The same models, tokens per second of CPU time, median of five steps taken in turns:",
        "",
        *page.table(["vocabulary", "ours", "plain loop", "ratio"], rows),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument("--train", nargs="+", default=[str(ROOT / "examples/text/train.txt")])
    parser.add_argument("--calibration", help="token ids to prune with, file.safetensors:name; by default of --train")
    scoring.options(parser)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--autocast", choices=["bfloat16"], help="of the training")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--mlp", type=float, default=0.25)
    parser.add_argument("--effort", choices=["fast", "balanced", "best"], default="balanced", help="of the pruning")
    parser.add_argument("--samples", type=int, default=128, help="to prune with")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument(
        "--labelled", nargs=2, metavar=("TRAIN", "TEST"), help=".tsv with sentence and label, for classifier"
    )
    parser.add_argument("--epochs", type=float, default=3.0, help="of the classifiers")
    parser.add_argument(
        "--jobs",
        nargs="+",
        default=["quality", "memory", "speed"],
        choices=["quality", "memory", "speed", "classifier", "ensemble"],
    )
    parser.add_argument("--scratch", type=Path, help="keep the students there, and take those that are there")
    parser.add_argument("--section", default="distill", help="of docs/benchmarks.md; '-' prints only")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(json.loads(args.one))
        return
    title = TITLES.get(args.jobs[0], "Distillation: what a step takes").format(model=Path(args.model).name)
    rows = [f"## {title}", ""]
    rows += [f"`{page.command('bench-distill', parser, args)}`: {page.environment()}"]
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="compress-bench-"))
    try:
        for job in args.jobs:
            told = {"quality": quality, "classifier": classifier, "ensemble": ensemble}.get(job)
            rows += ["", *(told(args, scratch) if told else memory() if job == "memory" else speed())]
    finally:
        if args.scratch is None:
            shutil.rmtree(scratch, ignore_errors=True)
    page.deliver(args.section, rows)


if __name__ == "__main__":
    main()
