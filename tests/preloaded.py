"""The server behind `tests.processes`: imports torch and transformers once, then forks a child for each request.

Run as a script with one argument, the descriptor of a Unix socket. A request is JSON with the child's stdout, stderr and status pipe
attached, and its stdin where it has one. A supervisor between server and child writes the child's process id and, when it has ended, its exit status and CPU seconds.
This file must import neither `compress` nor `tests`.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import socket
import sys
import threading
from typing import Any, NoReturn


class _Guard:
    """Refuses to import the package that is tested."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "compress" or name.startswith("compress."):
            raise ImportError("this process must not import compress")


#: What children would import sooner or later.
PRELOADED = (
    "torch",
    "transformers.modeling_utils",
    "transformers.conversion_mapping",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
    "transformers.utils.quantization_config",
    "compressed_tensors",
    "safetensors.torch",
    "huggingface_hub",
    "pydantic",
    "typer",
    "yaml",
)


def _supervise(status: int) -> bool:
    """Fork the child; true in the child, and the supervisor never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if not child:
        return True
    for number in (0, 1, 2):
        os.close(number)
    os.write(status, f"{child}\n".encode())
    _, found = os.waitpid(child, 0)
    seconds = sum(os.times()[2:4])
    os.write(status, f"{os.waitstatus_to_exitcode(found)} {seconds}\n".encode())
    os._exit(0)


def _serve(server: socket.socket) -> dict[str, Any]:
    """The request, in the child that is to answer it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors need no waiting for
    while True:
        head, descriptors, _, _ = socket.recv_fds(server, 8, 4)
        if not head:
            os._exit(0)
        text = b""
        while len(text) < int(head):
            text += server.recv(int(head) - len(text))
        if not os.fork():
            break
        for descriptor in descriptors:
            os.close(descriptor)
    server.close()
    stdout, stderr, status, *given = descriptors
    stdin = given[0] if given else os.open(os.devnull, os.O_RDONLY)
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for descriptor in (stdin, stdout, stderr):
        os.close(descriptor)
    _supervise(status)
    os.close(status)
    return dict(json.loads(text))


def _run(code: str) -> NoReturn:
    """Run it and end as an interpreter does, but for taking torch down module by module, which takes 0.3 s."""
    status: Any = 0
    # torch's pool of threads is made anew after a fork, by whoever asks first: two threads at once end in an assertion
    torch = sys.modules["torch"]
    torch.set_num_threads(torch.get_num_threads())
    try:
        exec(compile(code, "<child>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def main() -> None:
    server = socket.socket(fileno=int(sys.argv[1]))
    for name in PRELOADED:
        importlib.import_module(name)
    # a thousand regular expressions, which the first loading would compile
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("llama")
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    request = _serve(server)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["arguments"]
    if request["root"] is None:
        sys.meta_path.insert(0, _Guard())
    else:
        sys.path.insert(0, request["root"])
    _run(request["code"])


if __name__ == "__main__":
    main()
