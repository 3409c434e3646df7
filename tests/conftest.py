"""Shared fixtures. Tests build pico models from configs and need no network."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import re
import shutil
import sys
import types
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import processes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # threads take longer than what pico models give them to do

ROOT = Path(__file__).resolve().parent.parent


hypothesis.settings.register_profile("ci", max_examples=20, derandomize=True, deadline=None)
hypothesis.settings.register_profile("nightly", max_examples=200, deadline=None)
hypothesis.settings.load_profile("ci")  # `make test-all` asks for the other one on the command line


@functools.cache
def _names(functions: tuple[Callable[..., Any], ...]) -> frozenset[str]:
    """Names that these functions, and those that they call, use."""
    seen, todo = set[str](), [*functions]
    while todo:
        function = todo.pop()
        codes = [code] if (code := getattr(function, "__code__", None)) else []
        for code in codes:
            codes.extend(inner for inner in code.co_consts if isinstance(inner, types.CodeType))
            for name in set(code.co_names) - seen:
                seen.add(name)
                todo.append(function.__globals__.get(name))
    return frozenset(seen)


_DEAREST = re.compile(r"\b(unit|model|process)\b")


def _used(item: pytest.Function) -> frozenset[str]:
    """Names that a test, its fixtures (but those of all) and the functions that they call use."""
    known = item._fixtureinfo.name2fixturedefs
    fixtures = [found[-1].func for name, found in known.items() if not name.startswith("_")]
    return _names((item.function, *fixtures)) | set(item.fixturenames)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test by the dearest thing that it uses, `unit`, `model`, `process`, where such tests are asked for."""
    for item in items if _DEAREST.search(config.option.markexpr) else ():
        used = _used(item) if isinstance(item, pytest.Function) else frozenset()
        if used & {"subprocess", "processes", "Process"}:
            item.add_marker(pytest.mark.process)
        elif used & {"pico", "load_model", "open_checkpoint"}:
            item.add_marker(pytest.mark.model)
        else:
            item.add_marker(pytest.mark.unit)


def pytest_configure(config: pytest.Config) -> None:
    """Fixed examples need none of the numbers and words of this package's source, which takes each worker five seconds to read."""
    if config.getoption("hypothesis_profile", None) is None:
        from hypothesis.internal.conjecture import providers

        providers.is_local_module_file = lambda path: False


# Collecting garbage took a seventh of all time: torch and transformers make a million objects, which every full collection walks.
gc.disable()  # until all is imported


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()


class _Cpu:
    """CPU time of tests, processes that they wait for included: unlike wall time it is the same on a busy machine."""

    last = 0.0

    @classmethod
    def since(cls) -> float:
        times = os.times()
        now = times.user + times.system + times.children_user + times.children_system + processes.Process.seconds
        passed, cls.last = now - cls.last, now
        return passed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    passed = _Cpu.since()
    report.user_properties.append(("cpu", passed))
    return report


def pytest_runtest_logstart() -> None:
    _Cpu.since()  # what has passed since the last test is nobody's


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With `--durations`: CPU seconds by file."""
    count = terminalreporter.config.getoption("durations")
    if count is None:
        return
    seconds: Counter[str] = Counter()
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        for name, value in getattr(report, "user_properties", ()):
            if name == "cpu":
                seconds[report.nodeid.partition("::")[0]] += value
    terminalreporter.section(f"CPU seconds: {sum(seconds.values()):.0f}, by file")
    for name, value in seconds.most_common(count or None):
        terminalreporter.write_line(f"{value:8.1f} {name}")


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Two workers share the cores: more threads than that only wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _pico_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """All workers of one run share the pico checkpoints."""
    from tests import pico

    base = tmp_path_factory.getbasetemp()
    pico.CACHE = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pico-cache"


@pytest.fixture(scope="session", autouse=True)
def _no_fsync() -> Iterator[None]:
    """The disk is not waited for; where that matters (test_interrupted), processes of their own do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_values_on_meta() -> Iterator[None]:
    """Models on the meta device draw no values: that took a fifth of the time in which a pico model is loaded."""
    import torch

    def where_it_has_memory(draw: Callable[..., Any]) -> Callable[..., Any]:
        return lambda tensor, *args, **kwargs: tensor if tensor.is_meta else draw(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_uniform_", "uniform_", "normal_", "ones_", "zeros_"):
            patch.setattr(torch.nn.init, name, where_it_has_memory(getattr(torch.nn.init, name)))
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and a GPU where there is one."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return str(request.param)


@pytest.fixture(scope="session")
def pico_llama() -> Path:
    """A float32 pico Llama with tokenizer; read only."""
    from tests import pico

    return pico.folder("llama")


@pytest.fixture(scope="session")
def folders() -> Mapping[str, Path]:
    """Family ▶ a pico checkpoint without tokenizer; ``bf16``: a Llama in bfloat16; read only."""
    from tests import toolbox

    return toolbox.Folders()


@pytest.fixture
def folder(tmp_path: Path, pico_llama: Path) -> Path:
    """A pico Llama to change."""
    return Path(shutil.copytree(pico_llama, tmp_path / "model"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The tokenizer of pico models."""
    from tests import pico

    return pico.tokenizer()


@pytest.fixture(scope="module")
def data() -> Any:
    """Samples for calibration, [12, 24]."""
    import torch

    from compress.data.batches import Batches

    return Batches(torch.randint(2, 250, (12, 24), generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(training or calibration text, evaluation text with 40 documents), with nothing in common."""
    import random

    folder = tmp_path_factory.mktemp("texts")
    words = random.Random(0)

    def document(letters: str) -> str:
        return " ".join("".join(words.choices(letters, k=words.randint(2, 7))) for _ in range(60))

    (folder / "train.txt").write_text("\n<|doc|>\n".join(document("abcdefghij") for _ in range(60)))
    (folder / "valid.txt").write_text("\n<|doc|>\n".join(document("klmnopqrst") for _ in range(40)))
    return folder / "train.txt", folder / "valid.txt"


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pico BERT that tells three labels apart, and 40 labelled texts that it is mostly right on; read only."""
    import random

    import torch

    from tests import pico

    names = {0: "red", 1: "green", 2: "blue"}
    folder, texts = tmp_path_factory.mktemp("labelled"), random.Random(0)
    options = {"class_name": "BertForSequenceClassification", "id2label": names}
    options["label2id"] = {name: index for index, name in names.items()}
    model, tokenizer = pico.model("bert", **options), pico.tokenizer()
    rows = []
    for index in range(40):
        text = " ".join("".join(texts.choices("klmnopqrst", k=texts.randint(2, 7))) for _ in range(texts.randint(1, 8)))
        with torch.no_grad():
            label = int(model(**tokenizer(text, return_tensors="pt")).logits.argmax(-1))
        rows.append(f"{text}\t{(label + (index % 5 == 0)) % 3}")
    (folder / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    pico.save(folder / "model", "bert", **options)
    return folder / "model", folder / "dev.tsv"


@pytest.fixture(scope="session")
def stock() -> Callable[[str], str]:
    """Run Python code in a process that cannot import this package; returns its stdout."""

    def run(code: str) -> str:
        done = processes.run(code, foreign=True, folder="/")
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def stock_outputs(stock: Callable[[str], str]) -> Callable[..., dict[str, dict[str, Any]]]:
    """Load checkpoints in one process that cannot import this package, and compare their outputs with stored ones.

    Takes name ▶ (class, folder, file of `pico.save_expected`) and options of `from_pretrained`; gives name ▶ ``class``,
    ``difference`` (largest, relative to the largest value), ``numbers`` (every ``layer_idx``), or ``error``.
    """

    def run(cases: dict[str, tuple[str, Path, Path]], **options: Any) -> dict[str, dict[str, Any]]:
        listed = {name: [cls, str(folder), str(expected)] for name, (cls, folder, expected) in cases.items()}
        out = stock(
            "import json, torch, transformers\n"
            "torch.set_num_threads(1)\n"
            "result = {}\n"
            f"for name, (cls, folder, expected) in {listed!r}.items():\n"
            "    try:\n"
            f"        m, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True, **{options!r})\n"
            "        assert not any(info.values()), info\n"
            "        inputs, y = torch.load(expected)\n"
            "        with torch.no_grad():\n"
            "            x = m(**inputs)[0]\n"
            "        result[name] = {\n"
            "            'class': type(m).__name__,\n"
            "            'difference': float((x - y).abs().max() / y.abs().max()),\n"
            "            'numbers': sorted({p.layer_idx for p in m.modules() if hasattr(p, 'layer_idx')}),\n"
            "        }\n"
            "    except Exception as error:\n"
            "        result[name] = {'error': repr(error)}\n"
            "print(json.dumps(result))\n"
        )
        found: dict[str, dict[str, Any]] = json.loads(out.splitlines()[-1])
        return found

    return run


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, str]]:
    """Exit status and all that is printed of a command line."""
    from compress.cli import main

    def call(*arguments: Any) -> tuple[Any, str]:
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out + captured.err

    return call
