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

#: Most characters of an error.
_LONGEST = 300


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


class Vllm:
    """vLLM on a CPU, in this process, one text at a time."""

    def __init__(self, artefact: str, settings: dict[str, Any]) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        os.environ["OMP_NUM_THREADS"] = str(settings["threads"])
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import torch
        import vllm
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            raise RuntimeError(f"{settings['place']} has vLLM for {current_platform.device_name}, and not for CPUs")
        torch.cpu._init_amx()  # asks Linux for AMX, which a kernel of vLLM 0.32 for int4 uses without
        self.version, self.prompt, tokens = vllm.__version__, _ids(settings), settings["generated"] + 1
        options = {
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "max_num_seqs": 1,
            "skip_tokenizer_init": True,
        }
        self.engine = vllm.LLM(
            artefact,
            max_model_len=len(self.prompt) + tokens,
            trust_remote_code=settings["trust_remote_code"],
            **options,
        ).llm_engine
        self.sampling = vllm.SamplingParams(
            max_tokens=tokens, min_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        self.asked = 0

    def seconds(self) -> tuple[float, float]:
        """Seconds of the prompt, and of each token."""
        self.asked += 1
        start, times = time.perf_counter(), []
        self.engine.add_request(str(self.asked), {"prompt_token_ids": self.prompt}, self.sampling)
        while self.engine.has_unfinished_requests():
            times += [time.perf_counter() for _ in self.engine.step()]
        return times[0] - start, (times[-1] - times[0]) / (len(times) - 1)


RUNTIMES: dict[str, Any] = {"llama.cpp": LlamaCpp, "onnxruntime": Genai, "vllm": Vllm}


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
        words = " ".join(str(error).split())[:_LONGEST] or type(error).__name__
        say({"error": f"{name}: {words}", "resources": "memory" in words})


if __name__ == "__main__":
    main()
