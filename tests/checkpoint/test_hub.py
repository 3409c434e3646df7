"""Hub ids, against a server on this machine that speaks the few calls of the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import compress
from tests import pico, processes
from tests.conftest import ROOT

#: The command as a forked process runs it: constants of huggingface_hub are read again from the environment.
COMMAND = """
import importlib, huggingface_hub
from huggingface_hub import constants, hf_api
importlib.reload(constants)
hf_api.api.endpoint = constants.ENDPOINT
from compress.cli import main
main()
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one folder as the repository ``org/tiny``; ``sent`` counts the bytes of weight files that went out."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.sent, self.ranges = folder, 0, []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/tiny"):
            files = sorted(p.name for p in self.server.folder.iterdir())
            info = {
                "_id": "0",
                "id": "org/tiny",
                "sha": COMMIT,
                "private": False,
                "siblings": [{"rfilename": f} for f in files],
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
            if "/tree/" in path:
                rows = [
                    {"type": "file", "path": f, "size": (self.server.folder / f).stat().st_size, "oid": f}
                    for f in files
                ]
                return self.answer(200, json.dumps(rows).encode(), body)
            return self.answer(200, json.dumps(info).encode(), body)
        found = re.fullmatch(r"/org/tiny/resolve/(?:main|" + COMMIT + r")/([\w.-]+)", path)
        file = self.server.folder / found[1] if found else None
        if file is None or not file.is_file():
            code = "EntryNotFound" if found else "RepoNotFound"
            return self.answer(404, b"", body, {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": COMMIT})
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status = 200
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        if body and file.suffix == ".safetensors":
            self.server.sent += len(data)
            self.server.ranges.append(bool(asked))
        return self.answer(status, data, body, headers)

    def answer(self, status: int, data: bytes, body: bool, headers=None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path):
    server = Hub(pico.save(tmp_path / "repository", hidden_size=128, intermediate_size=512, max_shard_size="1MB"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def call(hub, tmp_path):
    """A command in a process whose hub is that server and whose cache is empty."""

    def run(*arguments, cold=False):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_OFFLINE"))}
        environment |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "no_proxy": "127.0.0.1",
            "NO_PROXY": "127.0.0.1",
        }
        if not cold:
            environment["HF_HUB_OFFLINE"] = "0"
            return processes.run(COMMAND, *arguments, environment=environment, folder=tmp_path, timeout=120)
        return subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path, timeout=120,
        )  # fmt: skip

    return run


def test_hub_headers_come_by_range_requests(hub, call):
    weights = sum(p.stat().st_size for p in hub.folder.glob("*.safetensors"))
    done = call("inspect", "org/tiny", "--json", cold=True)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    local = json.loads(call("inspect", hub.folder, "--json").stdout)
    assert data["tensors"] == local["tensors"]
    assert data["size"]["parameters"] == local["size"]["parameters"]
    assert hub.ranges
    assert all(hub.ranges)
    assert hub.sent < weights / 2


@pytest.mark.slow
def test_hub_run_downloads_once_then_works_offline(hub, call, tmp_path):
    (tmp_path / "r.yaml").write_text("model: org/tiny@main\noutput: out\npasses:\n  - cast: {weights: bf16}\n")
    done = call("run", "r.yaml", "--quiet", cold=True)
    assert done.returncode == 0, done.stderr
    sent = hub.sent
    assert sent >= sum(p.stat().st_size for p in hub.folder.glob("*.safetensors"))
    card = (tmp_path / "out/README.md").read_text()
    assert "\nbase_model: org/tiny\n" in card
    assert "[org/tiny](https://huggingface.co/org/tiny) at revision `main`, made smaller by `cast`." in card
    for options in ((), ("--offline",)):
        again = call("run", "r.yaml", "--fresh", "--quiet", *options)
        assert again.returncode == 0, again.stderr
    assert hub.sent == sent


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("org/gone", (), "org/gone: is neither a folder here nor a hub repository that you can read"),
        ("org/tiny", ("--offline",), "org/tiny: is not in the local cache"),
    ],
)
def test_hub_reports_what_is_missing(call, model, options, message):
    done = call("inspect", model, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_hub_reads_a_single_file_beside_shards(hub, call, tmp_path):
    """Headers by range requests and a run agree on what is read and on what is refused."""
    shards = sorted(hub.folder.glob("model-*"))
    state = {k: v for path in shards for k, v in load_file(path).items()}
    save_file(state, hub.folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "r.yaml").write_text("model: org/tiny\noutput: out\npasses:\n  - cast: {weights: bf16}\n")
    planned = call("plan", "r.yaml", "--json")
    assert planned.returncode == 0, planned.stderr
    data = json.loads(planned.stdout)
    assert data["original"]["bytes"] == (hub.folder / "model.safetensors").stat().st_size
    assert data["notes"][0].startswith("model.safetensors is read")
    hidden = shards[0].rename(tmp_path / "hidden")
    planned = call("plan", "r.yaml", "--json")
    assert json.loads(planned.stdout)["notes"][0].startswith("model.safetensors.index.json is not read")
    hidden.rename(shards[0])
    state["lm_head.weight"] = state["lm_head.weight"].bfloat16()
    save_file(state, hub.folder / "model.safetensors", {"format": "pt"})
    for command in ("plan", "run"):
        done = call(command, "r.yaml")
        assert done.returncode == 2
        assert "holds two models: model.safetensors, and other weights in the shards" in done.stderr


@pytest.mark.parametrize("equal", [pytest.param(True, marks=pytest.mark.slow), False])
def test_hub_compares_copies_of_tied_tensors_by_samples(equal, hub, call, tmp_path):
    """A plan from headers alone says the bytes that a run then writes."""
    path = hub.folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    state = {k: v for shard in hub.folder.glob("model-*") for k, v in load_file(shard).items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["lm_head.weight"][-1] += 0 if equal else 1
    for old in hub.folder.glob("model*"):
        old.unlink()
    save_file(state, hub.folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "r.yaml").write_text("model: org/tiny\noutput: out\npasses:\n  - cast: {weights: bf16}\n")
    planned = json.loads(call("plan", "r.yaml", "--json").stdout)
    assert all(hub.ranges)
    assert ("is stored once" if equal else "is kept beside") in planned["notes"][0]
    out = compress.apply("cast", hub.folder, tmp_path / "out", weights="bf16")
    written = (out / "model.safetensors").stat().st_size
    assert planned["stages"][0]["passes"][0]["planned"]["bytes"] == written
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not equal
