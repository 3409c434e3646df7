"""Gates as JUnit XML, one test case each, for CI systems that show test results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

#: Characters that XML 1.0 cannot hold: control characters, surrogates, and two noncharacters.
_FORBIDDEN = dict.fromkeys([*(i for i in range(32) if i not in (9, 10, 13)), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF])


def render_junit(report: Mapping[str, Any]) -> str:
    """JUnit XML of ``gates``, ``status`` and ``output``: a failed gate is a ``failure``, an inconclusive one an ``error``."""
    gates = report["gates"]
    counts = [sum(g["verdict"] == v for g in gates) for v in ("fail", "inconclusive")]
    suite = ElementTree.Element(
        "testsuite", name="compress gates", tests=str(len(gates)), failures=str(counts[0]), errors=str(counts[1])
    )
    properties = ElementTree.SubElement(suite, "properties")
    for key in ("status", "output"):
        ElementTree.SubElement(properties, "property", name=key, value=str(report[key]).translate(_FORBIDDEN))
    for gate in gates:
        name, text = (str(gate[key]).translate(_FORBIDDEN) for key in ("gate", "text"))
        case = ElementTree.SubElement(suite, "testcase", classname="compress.gates", name=name)
        if gate["verdict"] == "pass":
            ElementTree.SubElement(case, "system-out").text = text
        else:
            kind = "failure" if gate["verdict"] == "fail" else "error"
            ElementTree.SubElement(case, kind, message=text, type=gate["verdict"])
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
