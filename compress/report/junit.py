"""Gates as JUnit XML, one test case each, for CI systems that show test results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

#: Characters that XML 1.0 cannot hold: control characters, surrogates, and two noncharacters.
_FORBIDDEN = dict.fromkeys([*(i for i in range(32) if i not in (9, 10, 13)), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF])


def render_junit(report: Mapping[str, Any]) -> str:
    """JUnit XML of ``gates``, ``status`` and ``output``: a failed gate is a ``failure``, an inconclusive one an ``error``.

    Args:
        report: it may also have ``seconds``, ``started``, and ``recipe`` with the ``path`` of the recipe, which is the file of
            the gates. The suite has the time of the whole run; judging a gate takes none.
    """
    gates = report["gates"]
    counts = [sum(g["verdict"] == v for g in gates) for v in ("fail", "inconclusive")]
    known = {"time": "{:.3f}".format(report.get("seconds") or 0.0)}
    if started := report.get("started"):
        known["timestamp"] = started.partition("+")[0].translate(_FORBIDDEN)
    path = (report.get("recipe") or {}).get("path")
    place = {} if path is None else {"file": str(path).translate(_FORBIDDEN)}
    sums = {"tests": str(len(gates)), "failures": str(counts[0]), "errors": str(counts[1])}
    suite = ElementTree.Element("testsuite", {"name": "compress gates", **sums, **known, **place})
    properties = ElementTree.SubElement(suite, "properties")
    for key in ("status", "output"):
        ElementTree.SubElement(properties, "property", name=key, value=str(report[key]).translate(_FORBIDDEN))
    for gate in gates:
        name, text = (str(gate[key]).translate(_FORBIDDEN) for key in ("gate", "text"))
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "compress.gates", "name": name, "time": "0.000", **place}
        )
        if gate["verdict"] == "pass":
            ElementTree.SubElement(case, "system-out").text = text
        else:
            kind = "failure" if gate["verdict"] == "fail" else "error"
            ElementTree.SubElement(case, kind, message=text, type=gate["verdict"])
    root = ElementTree.Element("testsuites", {"name": "compress", **sums, "time": known["time"]})
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
