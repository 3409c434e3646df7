"""A process that measures tasks of lm-eval. Reads one JSON command on stdin and writes one answer on stdout.

It is `lm_eval --model hf`: the model is loaded by transformers alone, from the folder that the command names.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

#: Words in the names of errors of a data set that is neither here nor can be fetched.
_ABSENT = ("offline", "connection", "localentrynotfound", "datasetnotfound", "maxretry", "cachednotfound")


def main() -> None:
    """Answer one command. What lm-eval prints goes to stderr."""
    command = json.loads(sys.stdin.readline())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        answer = _measure(command)
    except Exception as error:
        answer = {"error": _words(error, command), "resources": isinstance(error, MemoryError)}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _measure(command: Mapping[str, Any]) -> dict[str, Any]:
    """Rows and values of every task, by its name."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = [os.path.abspath(t) if t.endswith(".yaml") else t for t in command["tasks"]]  # noqa: PTH100
    manager = TaskManager(include_defaults=not all(t.endswith(".yaml") for t in tasks))
    unknown = [t for t in tasks if not t.endswith(".yaml") and t not in manager.all_tasks]
    if unknown:
        return {"error": f"lm-eval has no task `{unknown[0]}`{_meant(unknown[0], manager.all_tasks)}"}
    result = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": command["folder"],
            "dtype": command["dtype"],
            "trust_remote_code": command["trust_remote_code"],
        },
        tasks=tasks,
        task_manager=manager,
        device=command["device"],
        batch_size=command["batch_size"],
        num_fewshot=command["shots"],
        limit=command["limit"],
        apply_chat_template=command["chat_template"],
        bootstrap_iters=0,
        log_samples=True,
    )
    assert result is not None
    measured = {name: _task(result, name) for name in sorted(result["samples"])}
    if empty := [name for name, task in measured.items() if not task["metrics"]]:
        return {"error": f"{empty[0]}: lm-eval computes none of its metrics; `metric_list` of the task names them"}
    return {"version": lm_eval.__version__, "tasks": measured}


def _meant(name: str, names: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean `{close[0]}`?" if close else "; `lm_eval ls tasks` lists them"


def _task(result: Any, name: str) -> dict[str, Any]:
    """One task: its values, and the values of each document by the first filter."""
    values = {key: value for key, value in result["results"][name].items() if "," in key and "_stderr," not in key}
    first = next((key.partition(",")[2] for key in values), "none")
    metrics = {
        k.partition(",")[0]: v for k, v in values.items() if k.endswith(f",{first}") and isinstance(v, (int, float))
    }
    samples = [s for s in result["samples"][name] if s.get("filter", first) == first]
    rows = [{"id": s["doc_id"], "hash": s["doc_hash"], **{m: _value(s[m]) for m in metrics if m in s}} for s in samples]
    return {
        "version": str(result["versions"].get(name)),
        "shots": result["n-shot"].get(name),
        "metrics": metrics,
        "higher": {metric: result["higher_is_better"].get(name, {}).get(metric) is not False for metric in metrics},
        "rows": sorted(rows, key=lambda row: row["id"]),
    }


def _value(value: Any) -> Any:
    """A number, or a sum and its divisor as a list; None for anything else."""
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return [float(part) for part in value]
    return float(value) if isinstance(value, (int, float)) else None


def _words(error: Exception, command: Mapping[str, Any]) -> str:
    """An error of lm-eval in one line; a data set that is not here is named as that."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    names = " ".join(f"{type(each).__name__} {each}" for each in chain).lower()
    tasks = ", ".join(command["tasks"])
    if any(word in names.replace(" ", "") for word in _ABSENT):
        return f"{tasks}: data of a task are not on this machine and cannot be fetched; fetch them once with a network"
    text = " ".join(str(error).split())[:200]
    return f"{tasks}: {type(error).__name__}{f': {text}' if text else ' in lm-eval'}"


if __name__ == "__main__":
    main()
