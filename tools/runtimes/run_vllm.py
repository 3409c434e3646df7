"""vLLM on a CPU: log-probabilities of the 20 likeliest tokens at each place, and greedy tokens, of checkpoint folders.

python run_vllm.py ASKED.json FOLDER OUT.npz [FOLDER OUT.npz …]
"""

import os

os.environ.update(
    TORCHDYNAMO_DISABLE="1",  # else small functions are compiled by g++
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
)

import gc
import time
from pathlib import Path

import numpy as np
import torch
import vllm
from each import each

#: Whether kernels for int4 round inputs that the checkpoint does not ask to round, where the CPU has AMX; so by default.
ROUNDS = "VLLM_CPU_INT4_W4A8"
LIKELIEST = 20
#: Tokens that are decoded where each token's inputs are rounded to fp8: without fp8 products in the CPU one takes seconds.
FEW = 4
torch.cpu._init_amx()  # asks Linux for AMX, which a kernel of vLLM 0.32 for int4 uses without


def outputs(folder, asked):
    """``top_ids`` and ``top_logprobs`` [places, 20], likeliest first, and ``greedy``, from products of bfloat16; with
    ``_by_default`` behind them what kernels give that round inputs, where there are any.
    """
    config = Path(folder, "config.json").read_text()
    if '"float-quantized"' in config and '"token"' in config:
        asked = asked | {"new_tokens": FEW}
    results = served(folder, asked, "0")
    if "pack-quantized" in config:
        results |= {f"{name}_by_default": value for name, value in served(folder, asked, "1").items()}
    return results | {"version": vllm.__version__}


def served(folder, asked, rounds):
    """What `outputs` says, for one value of `ROUNDS`."""
    gc.collect()  # a model that failed to load would close what the next one opens
    os.environ[ROUNDS] = rounds
    vllm.envs.disable_envs_cache()
    ids, prompt, count = asked["ids"], asked["prompt"], asked["new_tokens"]
    options = {"dtype": "bfloat16", "enforce_eager": True, "enable_prefix_caching": False, "max_num_seqs": 1}
    length = len(ids) + count
    model = vllm.LLM(folder, max_model_len=length, max_num_batched_tokens=length, **options)
    try:
        scored = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=LIKELIEST)
        (result,) = model.generate([{"prompt_token_ids": ids}], scored, use_tqdm=False)
        places = [
            sorted(place.items(), key=lambda one: one[1].rank)[:LIKELIEST] for place in result.prompt_logprobs[1:]
        ]
        start = time.perf_counter()
        freely = vllm.SamplingParams(max_tokens=count, min_tokens=count, temperature=0, ignore_eos=True)
        (decoded,) = model.generate([{"prompt_token_ids": prompt}], freely, use_tqdm=False)
        return {
            "top_ids": np.array([[token for token, _ in place] for place in places]),
            "top_logprobs": np.array([[value.logprob for _, value in place] for place in places]),
            "greedy": np.array(decoded.outputs[0].token_ids),
            "seconds": time.perf_counter() - start,
        }
    finally:
        del model
        gc.collect()


each(outputs)
