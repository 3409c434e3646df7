"""Train the example model: a small Llama on the text in `examples/text`.

    python examples/train_tiny_lm.py              train, evaluate, write examples/tiny-lm
    python examples/train_tiny_lm.py --evaluate   bits per byte of the shipped model beside its baselines

Byte-level BPE of 2,048 tokens; Llama with 6 blocks of width 256. Matrices are trained with Muon, the rest with AdamW, the
rate falls linearly over the last 60 % of the steps; each epoch is tokenised anew with BPE dropout (arXiv 1910.13267), which
keeps a model of four million parameters from learning one million tokens by heart. The weights best on valid.txt are kept.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import random
import time
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
OUT = HERE / "tiny-lm"
SEPARATOR = "\n<|doc|>\n"
END = "<|endoftext|>"
LENGTH = 256
BATCH = 16


def documents(name: str) -> list[str]:
    """Documents of examples/text/<name>.txt."""
    return (HERE / "text" / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n").split(SEPARATOR)


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE; <|endoftext|> is token 0 and stands before every document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def epoch(tokenizer: Tokenizer, texts: list[str], dropout: float, generator: random.Random) -> torch.Tensor:
    """All documents in random order as windows, int64 [n, LENGTH + 1]; the first window begins at a random offset."""
    tokenizer.model.dropout = dropout or None
    encoded = [[0, *e.ids] for e in tokenizer.encode_batch(texts)]
    tokenizer.model.dropout = None
    generator.shuffle(encoded)
    stream = torch.tensor([t for ids in encoded for t in ids][generator.randrange(LENGTH) :])
    count = (len(stream) - 1) // LENGTH
    starts = torch.arange(count) * LENGTH
    windows = stream[starts[:, None] + torch.arange(LENGTH + 1)]
    return windows[torch.randperm(count, generator=torch.Generator().manual_seed(generator.randrange(1 << 30)))]


@torch.no_grad()
def nll_per_document(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: list[str]) -> list[float]:
    """Nats of each document, in disjoint windows of LENGTH tokens, each begun by <|endoftext|>'s or the last token before it."""
    model.eval()
    rows, owner = [], []
    for i, ids in enumerate([0, *e.ids] for e in tokenizer.encode_batch(texts)):
        for start in range(0, len(ids) - 1, LENGTH):
            piece = ids[start : start + LENGTH + 1]
            rows.append(piece + [-100] * (LENGTH + 1 - len(piece)))
            owner.append(i)
    result = [0.0] * len(texts)
    table = torch.tensor(rows)
    for start in range(0, len(rows), 32):
        chunk = table[start : start + 32]
        logits = model(chunk[:, :-1].clamp(min=0)).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="none", ignore_index=-100
        )
        for row, total in enumerate(losses.view(len(chunk), -1).sum(1).tolist()):
            result[owner[start + row]] += total
    return result


def bits_per_byte(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Total bits over total UTF-8 bytes."""
    return sum(nll_per_document(model, tokenizer, texts)) / math.log(2) / sum(len(t.encode()) for t in texts)


def baselines(tokenizer: Tokenizer, train: list[str], test: list[str]) -> dict[str, float]:
    """Bits per byte of models that know nothing of order, and of general compressors."""
    a, b = SEPARATOR.join(train).encode(), SEPARATOR.join(test).encode()
    size = sum(len(t.encode()) for t in test)

    def unigram(known: Counter[int], seen: Counter[int], vocabulary: int) -> float:
        total = sum(known.values()) + vocabulary  # add-one smoothing
        return -sum(n * math.log2((known[s] + 1) / total) for s, n in seen.items()) / size

    tokens = [Counter(t for e in tokenizer.encode_batch(x) for t in e.ids) for x in (train, test)]

    def xz(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    return {
        "unigram over bytes": unigram(Counter(a), Counter(b), 256),
        "unigram over the model's tokens": unigram(*tokens, tokenizer.get_vocab_size()),
        "gzip -9": 8 * len(gzip.compress(b, 9)) / size,
        "xz -9e": 8 * xz(b) / size,
        "xz -9e, train.txt before it": 8 * (xz(a + b) - xz(a)) / size,
    }


def train(args: argparse.Namespace) -> tuple[LlamaForCausalLM, Tokenizer, dict[str, float]]:
    """Train and keep the weights that are best on valid.txt."""
    torch.manual_seed(0)
    generator = random.Random(0)
    texts, valid = documents("train"), documents("valid")
    tokenizer = make_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attention_dropout=args.dropout,
    )
    model = LlamaForCausalLM(config)
    forward = torch.compile(model)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.rate, weight_decay=args.decay, momentum=0.95),
        torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    start, step, best, kept, last = time.time(), 0, math.inf, {}, 0.0
    for number in range(args.epochs):
        windows = epoch(tokenizer, texts, args.bpe_dropout, generator)
        batches = windows[: len(windows) // BATCH * BATCH].split(BATCH)
        total = args.epochs * len(batches)
        model.train()
        for batch in batches:
            done = step / total
            factor = min(1.0, (step + 1) / 50) * min(1.0, (1 - done) / 0.6)
            for optimizer, initial in zip(optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, initial, strict=True):
                    group["lr"] = rate * factor
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = forward(batch[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step, last = step + 1, loss.item()
        score = bits_per_byte(model, tokenizer, valid)
        if score < best:
            best, kept = score, {k: v.detach().clone() for k, v in model.state_dict().items()}
        tokens = step * BATCH * LENGTH
        print(
            f"epoch {number + 1}/{args.epochs}: {tokens:,} tokens, {time.time() - start:.0f} s, train loss {last:.3f}, valid {score:.4f} bits per byte",
            flush=True,
        )
    model.load_state_dict(kept)
    model.config.attention_dropout = 0.0
    facts = {"tokens": step * BATCH * LENGTH, "minutes": (time.time() - start) / 60}
    return model.to(torch.bfloat16).eval(), tokenizer, facts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="evaluate the shipped model, train nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--bpe-dropout", type=float, default=0.1)
    args = parser.parse_args()
    if not args.evaluate:
        model, tokenizer, facts = train(args)
        model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
        model.save_pretrained(args.out)
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=1024
        )
        wrapped.save_pretrained(args.out)
        print(json.dumps(facts))
    model, info = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    rows = {f"this model, {n}.txt": bits_per_byte(model, tokenizer, documents(n)) for n in ("valid", "test")}
    for name, value in (rows | baselines(tokenizer, documents("train"), documents("test"))).items():
        print(f"{value:.3f}  {name}")
    ids = torch.tensor([[0, *tokenizer.encode("My fellow citizens, ").ids]])
    torch.manual_seed(1)
    print(
        repr(
            tokenizer.decode(
                model.generate(ids, max_new_tokens=60, do_sample=True, top_k=40, temperature=0.8)[0].tolist()
            )
        )
    )


if __name__ == "__main__":
    main()
