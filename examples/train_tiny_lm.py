"""Train the example model, a small Llama, on the text in `examples/text`.

    python examples/train_tiny_lm.py              train, evaluate, write examples/tiny-lm (about 30 minutes on one core)
    python examples/train_tiny_lm.py --evaluate   bits per byte of the shipped model beside its baselines

Byte-level BPE of 2,048 tokens; 6 blocks of width 256. The matrices are trained with Muon, the rest with AdamW, at rates
that fall linearly over the last 60 % of the steps. In every epoch some tokens are broken anew into the two they were
merged from (a seeded form of BPE dropout, arXiv 1910.13267), so that four million parameters do not learn a million
tokens by heart. The weights best on valid.txt are kept. The defaults are those of the shipped model.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import shutil
import time
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SEPARATOR = "\n<|doc|>\n"
END = "<|endoftext|>"
LENGTH = 256
BATCH = 16
PROMPTS = ("My fellow citizens,", "HAMLET\n", "And the LORD said unto")


def documents(name: str) -> list[str]:
    """Documents of examples/text/<name>.txt."""
    return (HERE / "text" / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n").split(SEPARATOR)


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE; <|endoftext|> is token 0 and stands before every document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[torch.Tensor]:
    """Each document by itself, <|endoftext|> first."""
    return [torch.tensor([0, *e.ids]) for e in tokenizer.encode_batch(texts)]


def merge_table(tokenizer: Tokenizer) -> torch.Tensor:
    """The two tokens that each token was merged from, int64 [vocabulary, 2]; -1 where there are none."""
    table = torch.full((tokenizer.get_vocab_size(), 2), -1)
    for left, right in json.loads(tokenizer.to_str())["model"]["merges"]:
        pair = [tokenizer.token_to_id(left), tokenizer.token_to_id(right)]
        table[tokenizer.token_to_id(left + right)] = torch.tensor(pair)
    return table


def unmerge(ids: torch.Tensor, table: torch.Tensor, chance: float, generator: torch.Generator) -> torch.Tensor:
    """The same text with some merged tokens broken in two, and some of those halves broken again."""
    for _ in range(2):
        hit = (torch.rand(len(ids), generator=generator) < chance) & (table[ids, 0] >= 0)
        last = (1 + hit.long()).cumsum(0) - 1
        broken = ids.repeat_interleave(1 + hit.long())
        broken[last[hit] - 1], broken[last[hit]] = table[ids[hit]].unbind(1)
        ids = broken
    return ids


def epoch_windows(
    encoded: list[torch.Tensor], table: torch.Tensor, chance: float, generator: torch.Generator
) -> torch.Tensor:
    """All documents, in random order and one after another, as shuffled windows, int64 [n, LENGTH + 1]."""
    order = torch.randperm(len(encoded), generator=generator).tolist()
    stream = unmerge(torch.cat([encoded[i] for i in order]), table, chance, generator)
    stream = stream[int(torch.randint(LENGTH, (), generator=generator)) :]
    count = (len(stream) - 1) // LENGTH
    windows = stream[torch.arange(count)[:, None] * LENGTH + torch.arange(LENGTH + 1)]
    return windows[torch.randperm(count, generator=generator)]


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Bits over UTF-8 bytes. Windows of LENGTH tokens do not overlap: each is predicted from within itself alone."""
    model.eval()
    rows = [
        torch.nn.functional.pad(piece, (0, LENGTH + 1 - len(piece)), value=-100)
        for ids in encode(tokenizer, texts)
        for piece in (ids[start : start + LENGTH + 1] for start in range(0, len(ids) - 1, LENGTH))
    ]
    nats = 0.0
    for batch in torch.stack(rows).split(32):
        logits = model(batch[:, :-1].clamp(min=0)).logits.float()
        nats += cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum", ignore_index=-100).item()
    return nats / math.log(2) / sum(len(t.encode()) for t in texts)


def baselines(tokenizer: Tokenizer, train: list[str], test: list[str]) -> dict[str, float]:
    """Bits per byte of test by models that know nothing of order, and by general compressors."""
    known, new = "\n".join(train).encode(), "\n".join(test).encode()
    size = sum(len(t.encode()) for t in test)

    def unigram(seen: Counter[int], counts: Counter[int], vocabulary: int) -> float:
        total = seen.total() + vocabulary  # add-one smoothing
        return -sum(n * math.log2((seen[symbol] + 1) / total) for symbol, n in counts.items()) / size

    def xz(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    tokens = [Counter(torch.cat([ids[1:] for ids in encode(tokenizer, t)]).tolist()) for t in (train, test)]
    octets = [Counter("".join(t).encode()) for t in (train, test)]
    zipped = [len(gzip.compress(data, 9)) for data in (known, known + new)]
    return {
        "unigram over bytes, fitted on train": unigram(octets[0], octets[1], 256),
        "unigram over the model's tokens, fitted on train": unigram(tokens[0], tokens[1], len(merge_table(tokenizer))),
        "gzip -9, test alone": 8 * len(gzip.compress(new, 9)) / size,
        "gzip -9, train + test less train": 8 * (zipped[1] - zipped[0]) / size,
        "xz -9e, test alone": 8 * xz(new) / size,
        "xz -9e, train + test less train": 8 * (xz(known + new) - xz(known)) / size,
    }


def train(args: argparse.Namespace) -> tuple[LlamaForCausalLM, Tokenizer, dict[str, str]]:
    """Train, keep the weights best on valid.txt, and say what it took."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    texts, valid = documents("train"), documents("valid")
    tokenizer = make_tokenizer(texts)
    encoded, table = encode(tokenizer, texts), merge_table(tokenizer)
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
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    forward = torch.compile(model)
    matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}
    rest = [p for n, p in model.named_parameters() if n not in matrices]
    groups = [
        (torch.optim.Muon(matrices.values(), lr=args.rate, weight_decay=args.decay), args.rate),
        (torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.95)), 3e-3),
    ]
    start, seen, best, kept = time.time(), 0, math.inf, {}
    for epoch in range(args.epochs):
        model.train()
        windows = epoch_windows(encoded, table, args.unmerge, generator)
        batches = windows[: len(windows) // BATCH * BATCH].split(BATCH)
        for number, batch in enumerate(batches):
            done = (epoch + number / len(batches)) / args.epochs
            for optimizer, rate in groups:
                factor = min((epoch * len(batches) + number + 1) / 50, (1 - done) / 0.6, 1.0)
                optimizer.param_groups[0]["lr"] = rate * factor
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = forward(batch[:, :-1]).logits
            loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, _ in groups:
                optimizer.step()
                optimizer.zero_grad()
            seen += batch[:, 1:].numel()
            if number % 50 == 0:
                print(f"{time.time() - start:.0f} s, {seen:,} tokens, loss {loss.item():.3f}", flush=True)
        score = bits_per_byte(model, tokenizer, valid)
        print(f"epoch {epoch + 1} of {args.epochs}, {time.time() - start:.0f} s: valid {score:.4f} bits per byte")
        if score < best:
            best, kept = score, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(kept)
    facts = {"tokens": f"{seen:,}", "epochs": str(args.epochs), "minutes": f"{(time.time() - start) / 60:.0f}"}
    return model.to(torch.bfloat16), tokenizer, facts | {"threads": str(args.threads)}


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the checkpoint beside its place, then put it there."""
    new = out.with_name(out.name + ".new")
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
    model.save_pretrained(new)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(new)
    if out.exists():
        shutil.rmtree(out)
    new.rename(out)


def evaluate(out: Path) -> tuple[dict[str, float], str]:
    """Bits per byte of the checkpoint and its baselines, and what it writes after PROMPTS."""
    model, loading = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    if any(loading.values()):
        raise SystemExit(f"{out} did not load cleanly: {loading}")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    rows = {f"this model, {name}": bits_per_byte(model, tokenizer, documents(name)) for name in ("valid", "test")}
    torch.manual_seed(0)
    texts = []
    for prompt in PROMPTS:
        ids = encode(tokenizer, [prompt])[0][None]
        for how in ({"do_sample": False}, {"do_sample": True, "top_k": 40, "temperature": 0.8}):
            ids_out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, pad_token_id=0, **how)
            texts.append(f"[{'sampled' if how['do_sample'] else 'greedy'}] {tokenizer.decode(ids_out[0].tolist())}")
    return rows | baselines(tokenizer, documents("train"), documents("test")), "\n\n".join(texts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="evaluate the model in --out, train nothing")
    parser.add_argument("--out", type=Path, default=HERE / "tiny-lm")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rate", type=float, default=0.02, help="Muon's")
    parser.add_argument("--decay", type=float, default=0.1, help="Muon's weight decay")
    parser.add_argument("--unmerge", type=float, default=0.05, help="chance that a merged token is broken in two")
    parser.add_argument("--threads", type=int, default=1, help="another number changes the last digits")
    args = parser.parse_args()
    facts = None
    if not args.evaluate:
        model, tokenizer, facts = train(args)
        save(model, tokenizer, args.out)
    figures, samples = evaluate(args.out)
    table = "\n".join(f"| {name} | {value:.3f} |" for name, value in figures.items())
    print(f"{table}\n\n{samples}")
    if facts:
        card = (HERE / "tiny_lm_card.md").read_text(encoding="utf-8")
        (args.out / "README.md").write_text(card.format(table=table, samples=samples, **facts), encoding="utf-8")


if __name__ == "__main__":
    main()
