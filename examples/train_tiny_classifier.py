"""Train the example classifier, a small BERT that tells lines of plays, of speeches and of Genesis apart.

    python examples/train_tiny_classifier.py              train, write examples/tiny-classifier and its labelled files
    python examples/train_tiny_classifier.py --evaluate   accuracy of the shipped model

The lines are those of the documents in `examples/text`: it learns from 2,500 of each kind of train.txt, of which
lines.train.tsv keeps 600 to calibrate with, and lines.test.tsv has 200 of each kind of test.txt. A vocabulary of 1,500
word pieces; 3 blocks of width 64, float32; four minutes on one core.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

HERE = Path(__file__).parent
OUTPUT = HERE / "tiny-classifier"
LABELS = ("play", "speech", "scripture")
SEPARATOR = "\n<|doc|>\n"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = (4, 24)
LENGTH = 48


def kind(document: str) -> str:
    """What a document is a piece of: scenes say so at their beginning, and every other verse of Genesis begins with And."""
    if re.match(r"(PROLOGUE|SCENE [IVX]+[.:])", document):
        return "play"
    lines = document.split("\n")
    return "scripture" if sum(line.startswith("And ") for line in lines) > len(lines) / 10 else "speech"


def lines(name: str, each: int, seed: int, beside: set[str]) -> list[tuple[str, str]]:
    """(text, label): so many of each kind, none of which stands in ``beside``, in an order drawn by seed."""
    found: dict[str, set[str]] = {label: set() for label in LABELS}
    for document in (HERE / "text" / f"{name}.txt").read_text(encoding="utf-8").split(SEPARATOR):
        pieces = (
            re.split(r"\n|(?<=[.;:?!]) ", document) if (label := kind(document)) != "play" else document.split("\n")
        )
        for piece in pieces:
            piece = re.sub(r"[\s\"]+", " ", piece).strip()
            if WORDS[0] <= len(piece.split()) <= WORDS[1] and not piece.isupper() and piece not in beside:
                found[label].add(piece)
    lot = random.Random(seed)
    rows = [
        (text, label) for label in LABELS for text in lot.sample(sorted(found[label]), min(each, len(found[label])))
    ]
    lot.shuffle(rows)
    return rows


def write(name: str, rows: list[tuple[str, str]]) -> None:
    """A labelled file."""
    with (HERE / "text" / f"lines.{name}.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([("text", "label"), *rows])


def read(name: str) -> list[tuple[str, str]]:
    """What `write` wrote."""
    with (HERE / "text" / f"lines.{name}.tsv").open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file, delimiter="\t")]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Word pieces of small letters, [CLS] and [SEP] around a text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, model_input_names=inputs, **names)


def batch(tokenizer: Any, rows: list[tuple[str, str]]) -> tuple[Any, torch.Tensor]:
    """Inputs and label ids."""
    inputs = tokenizer(
        [text for text, _ in rows], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    return inputs, torch.tensor([LABELS.index(label) for _, label in rows])


def accuracy(model: Any, tokenizer: Any, rows: list[tuple[str, str]]) -> float:
    """Share of rows that the model is right on."""
    right = 0
    with torch.inference_mode():
        for start in range(0, len(rows), 100):
            inputs, labels = batch(tokenizer, rows[start : start + 100])
            right += int((model(**inputs).logits.argmax(-1) == labels).sum())
    return right / len(rows)


def train(minutes: float) -> None:
    """Write the labelled files and the model."""
    torch.manual_seed(0)
    held_out = lines("test", 200, 0, set())
    rows = lines("train", 2_500, 1, {text for text, _ in held_out})
    write("test", held_out)
    write("train", rows[:600])  # enough to calibrate with
    tokenizer = make_tokenizer([text for text, _ in rows])
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
            max_position_embeddings=64, id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)},
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    lot, start, step = random.Random(0), time.time(), 0
    model.train()
    while (spent := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * (1 - spent)
        inputs, labels = batch(tokenizer, lot.sample(rows, 64))
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    model.eval()
    print(f"{step} steps; accuracy on lines.test.tsv {accuracy(model, tokenizer, held_out):.2%} of {len(held_out)}")
    model.save_pretrained(OUTPUT)
    tokenizer.save_pretrained(OUTPUT)


def main() -> None:
    """Train, or evaluate what is shipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="accuracy of the shipped model")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training")
    options = parser.parse_args()
    if options.evaluate:
        model = BertForSequenceClassification.from_pretrained(OUTPUT).eval()
        print(f"accuracy {accuracy(model, AutoTokenizer.from_pretrained(OUTPUT), read('test')):.2%}")
    else:
        train(options.minutes)


if __name__ == "__main__":
    main()
