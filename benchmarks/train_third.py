"""Train the third model of the benchmarks: GPT-2's architecture, on the source of Python's standard library.

    python benchmarks/train_third.py            write benchmarks/third: the model, and its texts
    python benchmarks/train_third.py --resume   go on where it was stopped

The other two models are Llamas of English prose. This one has biases, LayerNorm, absolute positions and tied embeddings;
its text is code; its widths, 256 and 1,024, are multiples of 256. Byte-level BPE of 2,048 tokens, 6 blocks. The matrices are
trained with Muon, the rest with AdamW, at rates that fall linearly over the last 60 % of the steps. The text is that of the
interpreter that runs the script, without its tests; modules for valid.txt and test.txt are drawn by their names. The model is
committed: it was trained once, with the defaults.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

HERE = Path(__file__).parent / "third"
SEPARATOR = "\n<|doc|>\n"
END = "<|endoftext|>"
LENGTH, BATCH = 256, 16
#: Bytes of each text that is kept: calibration, choosing, figures.
KEPT = {"train": 1_500_000, "valid": 250_000, "test": 250_000}
#: Packages of the library that are no code of it.
LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "idlelib",
    "turtledemo",
    "__pycache__",
}


def modules() -> dict[str, list[tuple[str, str]]]:
    """Path and source of each module, in three parts: a tenth and a tenth are held out, by a hash of the path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "valid": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if LEFT_OUT & set(name.split("/")) or "lib-dynload" in name or path.stat().st_size < 500:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lot = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
        parts[{0: "valid", 1: "test"}.get(lot, "train")].append((name, text.strip()))
    return parts


def ordered(part: list[tuple[str, str]]) -> list[str]:
    """Texts in the order of a hash of their paths."""
    return [text for _, text in sorted(part, key=lambda item: hashlib.sha256(b"order" + item[0].encode()).digest())]


def keep(texts: list[str], size: int) -> str:
    """Documents up to about that many bytes; long ones are cut at 20,000 characters."""
    kept: list[str] = []
    for text in texts:
        if (total := sum(len(t.encode()) for t in kept)) >= size:
            break
        kept.append(text[: min(20_000, size - total)])
    return SEPARATOR.join(kept) + "\n"


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE; <|endoftext|> is token 0 and stands before every document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def windows(tokenizer: Tokenizer, texts: list[str], seed: int) -> torch.Tensor:
    """All documents one after another, as shuffled windows, int64 [n, LENGTH + 1]."""
    stream = torch.cat([torch.tensor([0, *encoded.ids]) for encoded in tokenizer.encode_batch(texts)])
    count = (len(stream) - 1) // LENGTH
    cut = stream[torch.arange(count)[:, None] * LENGTH + torch.arange(LENGTH + 1)]
    return cut[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]


@torch.no_grad()
def loss_of(model: GPT2LMHeadModel, cut: torch.Tensor) -> float:
    """Nats per token."""
    model.eval()
    total = sum(
        cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
        for rows in cut.split(BATCH)
    )
    model.train()
    return total / cut[:, 1:].numel()


def train(options: argparse.Namespace) -> tuple[GPT2LMHeadModel, Tokenizer]:
    """Train; the state is kept every 25 steps in ``options.state``."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    parts = {name: ordered(part) for name, part in modules().items()}
    HERE.mkdir(exist_ok=True)
    for name, size in KEPT.items():
        (HERE / f"{name}.txt").write_text(keep(parts[name], size), encoding="utf-8")
    tokenizer = make_tokenizer(parts["train"])
    data = windows(tokenizer, parts["train"], 0)
    valid = windows(tokenizer, parts["valid"], 0)[:48]
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=512, n_embd=256, n_layer=6, n_head=4,
        bos_token_id=0, eos_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n}
    rest = [p for n, p in model.named_parameters() if n not in matrices]
    optimizers = [
        (torch.optim.Muon(matrices.values(), lr=0.02, weight_decay=0.1), 0.02),
        (torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.95)), 3e-3),
    ]
    first = 0
    if options.resume and options.state.exists():
        state = torch.load(options.state)
        model.load_state_dict(state["model"])
        for (optimizer, _), kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        first = state["step"]
    print(
        f"{data[:, 1:].numel():,} tokens at hand, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True
    )
    start = time.process_time()
    for step in range(first, options.steps):
        at = step * BATCH % (len(data) - BATCH)
        batch, done = data[at : at + BATCH], step / options.steps
        for optimizer, rate in optimizers:
            optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 50, (1 - done) / 0.6, 1.0)
        loss = cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 25 == 24:
            kept = [optimizer.state_dict() for optimizer, _ in optimizers]
            torch.save({"step": step + 1, "model": model.state_dict(), "optimizers": kept}, options.state)
            print(f"step {step + 1}, {time.process_time() - start:.0f} CPU s, loss {loss.item():.3f}", flush=True)
        if step % 100 == 99:
            print(f"step {step + 1}: valid {loss_of(model, valid):.4f} nats per token", flush=True)
    return model, tokenizer


def main() -> None:
    """Train and write benchmarks/third."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=800)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--resume", action="store_true")
    options.add_argument("--state", type=Path, default=Path("out/third.pt"))
    args = options.parse_args()
    args.state.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = train(args)
    out = HERE / "model"
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
    model.save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)
    rows = windows(tokenizer, (HERE / "test.txt").read_text(encoding="utf-8").removesuffix("\n").split(SEPARATOR), 0)
    facts = {
        "python": sys.version.split()[0], "steps": args.steps, "tokens": args.steps * BATCH * LENGTH,
        "test nats per token": round(loss_of(model.float(), rows[:128]), 4),
    }  # fmt: skip
    (HERE / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(facts)


if __name__ == "__main__":
    main()
