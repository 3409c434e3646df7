"""Hostile checkpoints, run folders and recipes: no code of theirs runs, no file of others is read, written or printed.

    python -m tests.campaigns.attacks [--only NAME]

Each attack makes its inputs below a folder of its own, beside one that it must not touch, and names commands with the exit
statuses that are right. Then: no secret text stands in any output or file, nothing outside has changed, and no code has run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests import pico
from tests.campaigns import forked, ledger, scenes

SECRET = "SECRET-5f1d9c"
#: Sidecars that a run copies, or reads.
SIDECARS = (
    "README.md", "LICENSE", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "preprocessor_config.json", "vocab.json", "merges.txt", "added_tokens.json",
)  # fmt: skip
Command = tuple[list[str], tuple[int, ...]]
ATTACKS: dict[str, Callable[[Path, Path], list[Command]]] = {}


def attack(make: Callable[[Path, Path], list[Command]]) -> Callable[[Path, Path], list[Command]]:
    """Add an attack to the list. It takes its folder, with ``m`` a pico Llama, and the folder of others."""
    ATTACKS[make.__name__] = make
    return make


def recipe(folder: Path, passes: Sequence[Any] = ({"cast": {"weights": "bf16"}},), **changes: Any) -> list[str]:
    """Arguments of ``compress run`` for the model in a folder."""
    path = folder / "r.json"
    path.write_text(
        json.dumps({"model": str(folder / "m"), "output": str(folder / "out"), "passes": list(passes), **changes})
    )
    return ["run", str(path), "--quiet"]


def every(folder: Path, *statuses: int) -> list[Command]:
    """All commands that read a checkpoint."""
    model = str(folder / "m")
    out = statuses or (0, 2)
    return [
        (["inspect", model], out),
        (["diff", model, model], out),
        (["unpack", model, str(folder / "unpacked")], out),
        (recipe(folder), out),
    ]


def config(folder: Path, **changes: Any) -> None:
    """Change keys of the model's config."""
    path = folder / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def code(folder: Path, others: Path) -> str:
    """Python that shows that it was run."""
    return f"import pathlib; pathlib.Path({str(others / 'ran')!r}).write_text('code of a checkpoint was run')\n"


def replace(path: Path, target: Path) -> None:
    """A link in place of a file."""
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@attack
def links_for_sidecars(folder: Path, others: Path) -> list[Command]:
    """Each of them would be copied into the output, or printed by an error."""
    found: list[Command] = []
    for name in SIDECARS:
        case = folder / name.replace(".", "_")
        shutil.copytree(folder / "m", case / "m")
        replace(case / "m" / name, others / "secret.txt")
        found += every(case)
    return found


@attack
def links_for_config_and_weights(folder: Path, others: Path) -> list[Command]:
    """The secret may not appear in an error either."""
    shutil.copytree(folder / "m", folder / "b" / "m")
    replace(folder / "m" / "config.json", others / "secret.txt")
    replace(folder / "b" / "m" / "model.safetensors", others / "secret.txt")
    return every(folder, 2) + every(folder / "b", 2)


@attack
def a_forged_hub_cache(folder: Path, others: Path) -> list[Command]:
    """Links into ``blobs`` are those of a hub cache; here ``blobs`` itself leads out."""
    cache = folder / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    (folder / "m").rename(cache / "snapshots" / "m")
    (cache / "blobs").symlink_to(others)
    replace(cache / "snapshots" / "m" / "LICENSE", Path("../../blobs/secret.txt"))
    return every(cache / "snapshots")


@attack
def an_index_that_leads_out(folder: Path, others: Path) -> list[Command]:
    """By ``..``, by an absolute path, to a device, and to a pipe."""
    found: list[Command] = []
    for number, file in enumerate(
        ("../../others/secret.txt", str(others / "secret.txt"), "/dev/zero", "pipe", "/dev/stdin")
    ):
        case = folder / str(number)
        shutil.copytree(folder / "m", case / "m")
        (case / "m" / "model.safetensors").rename(case / "m" / "x.safetensors")
        index = {"metadata": {}, "weight_map": {"lm_head.weight": file}}
        (case / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
        os.mkfifo(case / "m" / "pipe")
        found += every(case, 2)
    return found


@attack
def pipes_for_files(folder: Path, others: Path) -> list[Command]:
    """Opening one would wait for ever."""
    found: list[Command] = []
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"):
        case = folder / name.replace(".", "_")
        shutil.copytree(folder / "m", case / "m")
        (case / "m" / name).unlink(missing_ok=True)
        os.mkfifo(case / "m" / name)
        found += every(case)
    return found


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.text,)


@attack
def pickles(folder: Path, others: Path) -> list[Command]:
    """As ``pytorch_model.bin``, and under the name of a safetensors file."""
    data = pickle.dumps(Bomb(code(folder, others)))
    shutil.copytree(folder / "m", folder / "b" / "m")
    (folder / "m" / "model.safetensors").unlink()
    (folder / "m" / "pytorch_model.bin").write_bytes(data)
    (folder / "b" / "m" / "model.safetensors").write_bytes(data)
    return every(folder, 2) + every(folder / "b", 2)


def compact(folder: Path) -> None:
    """Put a compact checkpoint in place of the model."""
    done = forked.command(
        recipe(folder, [{"prune_unstructured": {"method": "magnitude", "sparsity": "50%"}}], store="compact"), folder
    )
    assert done.status == 0, done.output
    shutil.rmtree(folder / "m")
    (folder / "out").rename(folder / "m")
    shutil.rmtree(folder / "out.run")


@attack
def a_hostile_bundled_file(folder: Path, others: Path) -> list[Command]:
    """``modeling_compress.py`` is neither run nor carried on."""
    compact(folder)
    for path in (folder / "m").glob("*.py"):
        path.write_text(code(folder, others) + f"# {SECRET}\n")
    return [
        *every(folder, 0),
        (["eval", str(folder / "m"), "--data", str(folder / "valid.txt"), "--window", "32"], (0,)),
    ]


@attack
def code_asked_for_by_a_compact_base(folder: Path, others: Path) -> list[Command]:
    """An ``auto_map`` inside of ``base``, which transformers would ask the user about."""
    compact(folder)
    (folder / "m" / "evil.py").write_text(code(folder, others))
    data = json.loads((folder / "m" / "config.json").read_text())
    names = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    config(folder, base={**data["base"], "auto_map": names, "architectures": ["AutoModelForCausalLM"]})
    return every(folder)


@attack
def code_of_its_own(folder: Path, others: Path) -> list[Command]:
    """``auto_map`` without ``trust_remote_code``, here and in another repository."""
    (folder / "m" / "evil.py").write_text(code(folder, others))
    config(folder, auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]})
    shutil.copytree(folder / "m", folder / "b" / "m")
    config(folder / "b", auto_map={"AutoModelForCausalLM": "evil/repo--evil.Evil"})
    return every(folder) + every(folder / "b")


@attack
def classes_that_are_no_models(folder: Path, others: Path) -> list[Command]:
    """``architectures`` names any attribute of transformers."""
    found: list[Command] = []
    for name in (
        "AutoModelForCausalLM",
        "TrainingArguments",
        "set_seed",
        "__version__",
        "pipeline",
        "T5Tokenizer",
        "os",
    ):
        shutil.copytree(folder / "m", folder / name / "m")
        config(folder / name, architectures=[name])
        found += every(folder / name)
    return found


@attack
def kernels_from_the_hub(folder: Path, others: Path) -> list[Command]:
    """Choices of attention and expert kernels in a config are ignored."""
    found: list[Command] = []
    for key in (
        "_attn_implementation",
        "attn_implementation",
        "experts_implementation",
        "_attn_implementation_internal",
    ):
        for value in ("flash_attention_2", "kernels-community/evil"):
            case = folder / f"{key}-{value.replace('/', '-')}"
            shutil.copytree(folder / "m", case / "m")
            config(case, **{key: value})
            found.append((recipe(case), (0,)))
    return found


@attack
def a_run_folder_that_is_a_link(folder: Path, others: Path) -> list[Command]:
    """The run folder, and what lies in it, lead to folders and files of others."""
    found: list[Command] = []
    for name in ("", "stages", "work", "measurements", "lock", "report.json", "report.md", "inputs.json"):
        case = folder / f"at-{name or 'whole'}"
        shutil.copytree(folder / "m", case / "m")
        if name:
            (case / "out.run").mkdir()
        link = case / "out.run" / name if name else case / "out.run"
        link.symlink_to(others / "secret.txt" if "." in name or name == "lock" else others / "photos")
        out = str(case / "out")
        found += [
            (recipe(case), (0, 2)),
            (["clean", "--dry-run", out], (0, 2)),
            (["clean", "--all", out], (0, 2)),
            (["runs", str(case)], (0,)),
        ]
    return found


@attack
def folders_of_others_with_names_of_ours(folder: Path, others: Path) -> list[Command]:
    """``NAME.run`` that is none, and a path through a link whose ``..`` is elsewhere."""
    for number, name in enumerate(("report.json", "stages/album/photo", "work/album/photo", "measurements/x.json")):
        path = others / f"{number}.run" / name
        path.parent.mkdir(parents=True)
        path.write_text(SECRET)
    (folder / "link").symlink_to(others / "photos")
    found: list[Command] = []
    for number in range(4):
        for output in (others / str(number), folder / "link" / ".." / str(number)):
            found += [
                (recipe(folder, output=str(output)), (2,)),
                (["clean", str(output)], (2,)),
                (["clean", "--all", str(output)], (2,)),
                (["clean", "--all", f"{output}.run/"], (2,)),
            ]
    return [*found, (["runs", str(others)], (0,))]


@attack
def an_output_that_is_a_link(folder: Path, others: Path) -> list[Command]:
    """To an empty folder, to one that is full, and to none."""
    found: list[Command] = []
    for number, target in enumerate((others / "photos", others / "empty", others / "none")):
        case = folder / str(number)
        shutil.copytree(folder / "m", case / "m")
        (case / "out").symlink_to(target)
        found += [(recipe(case), (2,)), (["unpack", str(case / "m"), str(case / "out")], (2,))]
    return found


@attack
def a_pattern_that_never_ends(folder: Path, others: Path) -> list[Command]:
    """``(a+)+$`` against ``aaaa…!`` takes time that doubles with every letter."""
    path = folder / "m" / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    size = len(data) - 8 - length
    header["a" * 40 + "!.weight_scale"] = {"dtype": "F32", "shape": [1], "data_offsets": [size, size + 4]}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :] + b"\0\0\0\0")
    group = {
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
        "targets": ["re:(a+)+$"],
    }
    config(
        folder,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "ignore": ["re:(a+)+$"],
            "config_groups": {"group_0": group},
        },
    )
    return every(folder, 2)


@attack
def sizes_beyond_all_memory(folder: Path, others: Path) -> list[Command]:
    """A config that claims them, and headers that do."""
    found: list[Command] = []
    for key, value in (
        ("num_hidden_layers", 10**9),
        ("intermediate_size", 10**18),
        ("vocab_size", 10**15),
        ("num_labels", 10**9),
    ):
        case = folder / key
        shutil.copytree(folder / "m", case / "m")
        config(case, **{key: value})
        found += every(case)
    case = folder / "header"
    shutil.copytree(folder / "m", case / "m")
    (case / "m" / "model.safetensors").write_bytes(struct.pack("<Q", 10**15) + b"{}")
    return found + every(case, 2)


@attack
def escapes_for_the_terminal(folder: Path, others: Path) -> list[Command]:
    """Names with control characters; the check of outputs looks for raw ones."""
    config(folder, model_type="llama\x1b]0;owned\x07", architectures=["Llama\x1b[2J"])
    shutil.copytree(folder / "m", folder / "b\x1b[31m" / "m")
    return every(folder) + every(folder / "b\x1b[31m")


@attack
def compressed_text_without_end(folder: Path, others: Path) -> list[Command]:
    """A gigabyte of one letter in a megabyte."""
    with gzip.open(folder / "big.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(256):
            file.write(b"a" * (1 << 22))
    data = {"evaluation": {"files": [str(folder / "big.txt.gz")], "window": 32, "max_documents": 1}}
    return [(recipe(folder, data=data, evaluate=["bits_per_byte"]), (0, 2, 4))]


@attack
def recipes_that_grow_or_run(folder: Path, others: Path) -> list[Command]:
    """Aliases of aliases, tags of Python, nesting without end, and ``extends`` to a file that is not a recipe."""
    texts = {
        "bomb": "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
        "tag": f"model: !!python/object/apply:os.system ['touch {others / 'ran'}']\n",
        "deep": "passes: " + "[" * 5000 + "]" * 5000 + "\n",
        "extends": f"extends: {others / 'secret.txt'}\n",
    }
    found: list[Command] = []
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
        found += [(["check", str(folder / f"{name}.yaml")], (2,)), (["run", str(folder / f"{name}.yaml")], (2,))]
    return found


@attack
def a_template_without_end(folder: Path, others: Path) -> list[Command]:
    """Two nested loops of a chat template."""
    (folder / "m" / "chat_template.jinja").write_text(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    (folder / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n")
    data = {"evaluation": {"files": [str(folder / "chat.jsonl")], "window": 32}}
    return [(recipe(folder, data=data, evaluate=["bits_per_byte"]), (2,))]


def try_one(name: str, place: Path) -> list[str]:
    """What went wrong."""
    folder, others = place / "case", place / "others"
    for path in (folder, others / "photos", others / "empty"):
        path.mkdir(parents=True)
    pico.save(folder / "m", "llama", num_hidden_layers=2)
    (folder / "valid.txt").write_text("some words to read, and more of them. " * 20)
    for path in (others / "secret.txt", others / "photos" / "cat.jpg", others / "photos" / "x.json"):
        path.write_text(SECRET)
    commands = ATTACKS[name](folder, others)
    before = _tree(others)
    wrong: list[str] = []
    for arguments, statuses in commands:
        done = forked.command(arguments, folder, limit=60)
        text = f"{name}: {' '.join(arguments)[-120:]}"
        if done.status not in statuses or done.traceback:
            wrong.append(f"{text}: status {done.status}: {done.output[-300:]}")
        if SECRET in done.output:
            wrong.append(f"{text}: printed the secret")
        if raw := [c for c in done.output if not c.isprintable() and c not in "\n\r\t"]:
            wrong.append(f"{text}: printed {raw[0]!r} raw")
        if _tree(others) != before:
            return [*wrong, f"{text}: changed what lies outside: {_tree(others).keys() ^ before.keys()}"]
    copied = [
        p
        for p in folder.rglob("*")
        if p.is_file() and not p.is_symlink() and p.suffix != ".py" and SECRET.encode() in p.read_bytes()
    ]
    carried = [p for p in folder.rglob("*.py") if p.parent.name != "m" and SECRET.encode() in p.read_bytes()]
    return wrong + [f"{name}: the secret stands in {p.relative_to(folder)}" for p in copied + carried]


def _tree(folder: Path) -> dict[str, Any]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Try all attacks, or one."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaigns.attacks", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--only", choices=sorted(ATTACKS))
    parser.add_argument("--no-ledger", action="store_true", help="write nothing to docs/reliability.json")
    chosen = parser.parse_args(arguments)
    forked.preload()
    entry, failures = ledger.Entry("attacks", ledger.commit(), 0), 0
    for name in [chosen.only] if chosen.only else ATTACKS:
        place = scenes.place()
        try:
            wrong = try_one(name, place)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        entry.count(["failed" if wrong else "held"], wrong)
        failures += bool(wrong)
        print(f"{'FAILED' if wrong else 'held'}  {name}", *wrong, sep="\n    ", flush=True)
    if not chosen.no_ledger and not chosen.only:
        ledger.save(entry)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
