"""Process that times one model in a runtime: ``python runtime_worker.py RUNTIME ARTEFACT SETTINGS``.

It says its ``version``, then answers each line of JSON on stdin by one line on stdout: seconds of the prompt, and seconds per
decoded token. It runs in the runtime's own environment, so it imports nothing of this package but where that is llama.cpp.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


class LlamaCpp:
    """llama.cpp through its C library."""

    def __init__(self, artefact: str, settings: dict[str, Any]) -> None:
        from compress.evaluation.llama_cpp import Model, find_libraries

        folder = find_libraries(Path(settings["place"]))
        assert folder is not None
        length = settings["prompt"] + settings["generated"]
        self.model = Model(artefact, folder, length=length, threads=settings["threads"])
        self.version = self.model.lib.version
        self.counts = settings["prompt"], settings["generated"]

    def seconds(self) -> tuple[float, float]:
        """Seconds of the prompt, and of each token."""
        return self.model.seconds(*self.counts)


class Genai:
    """onnxruntime-genai."""

    def __init__(self, artefact: str, settings: dict[str, Any]) -> None:
        import onnxruntime_genai as genai

        self.genai, self.version = genai, genai.__version__
        config = genai.Config(artefact)
        options = {"intra_op_num_threads": settings["threads"], "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = genai.Model(config)
        self.prompt, self.generated = _ids(settings), settings["generated"]

    def seconds(self) -> tuple[float, float]:
        """Seconds of the prompt, and of each token."""
        length = len(self.prompt) + self.generated + 1
        options = self.genai.GeneratorParams(self.model)
        options.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=1)
        generator = self.genai.Generator(self.model, options)
        start = time.perf_counter()
        generator.append_tokens([self.prompt])
        generator.generate_next_token()
        read = time.perf_counter()
        for _ in range(self.generated):
            generator.generate_next_token()
        return read - start, (time.perf_counter() - read) / self.generated


RUNTIMES: dict[str, Any] = {"llama.cpp": LlamaCpp, "onnxruntime": Genai}


def _ids(settings: dict[str, Any]) -> list[int]:
    return [1 + place % 100 for place in range(settings["prompt"])]


def main() -> None:
    """Load the model, describe it on stdout, then answer commands."""
    out = os.fdopen(os.dup(1), "w")  # prints of libraries must not mix with the answers
    os.dup2(2, 1)
    name, artefact, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

    def say(data: dict[str, Any]) -> None:
        out.write(json.dumps(data) + "\n")
        out.flush()

    try:
        runtime = RUNTIMES[name](artefact, settings)
        say({"version": runtime.version})
        for _ in sys.stdin:
            read, token = runtime.seconds()
            say({"prefill": read, "decode": token, "seconds": read + token * settings["generated"]})
    except Exception as error:
        say({"error": f"{name}: {error or type(error).__name__}", "resources": "memory" in str(error)})


if __name__ == "__main__":
    main()
