from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from compress.report.lengths import HEAD, length_cells, length_notes
from compress.report.pictures.lines import draw, length_charts
from compress.report.pictures.svg import standalone


def timing(seconds, ratio=None):
    found = {"median": seconds, "cpu": {"median": seconds}}
    for clock in (found, found["cpu"]):
        clock |= {} if ratio is None else {"ratio": ratio, "lower": ratio - 0.01, "upper": ratio + 0.01}
    return found


def side(c, parts, ratio=None, paths=(), counted=0):
    lengths = (512, 2048, 8192)
    rows = [
        {
            "length": n,
            "prefill": timing(1e-4 * n + c * n * n, ratio),
            "decode": timing(0.03, ratio),
            "memory": {"peak": 1000 * n},
            "cache": {"values": n + counted, "planned": n, "bytes": 4 * n},
            "paths": [{"path": path, "prefill": timing(0.5, 0.25)} for path in paths],
        }
        for n in lengths
    ]
    fit = {"clock": "cpu", "a": 0.0, "b": 1e-4, "c": c, "half": 1e-4 / c if c else None, "doubt": None}
    tried = [{"length": 32768, "reason": "may need 9 GB of memory, 1 GB are left"}]
    return {"latency": {"lengths": rows, "fit": fit, "not_tried": tried}, "size": {"cache": parts}}


@pytest.fixture
def sides():
    windowed = [{"bytes_per_token": 250, "tokens": None}, {"bytes_per_token": 750, "tokens": 255}]
    before = side(1e-8, [{"bytes_per_token": 1000, "tokens": None}])
    return before, side(1e-9, windowed, 0.3, paths=("compress_local", "chunks"))


def test_cells_have_every_quantity_at_every_length(sides):
    cells = length_cells(*sides)
    assert {len(row) for row in cells} == {len(HEAD)}
    assert [row[0] for row in cells if row[0]] == ["512", "2,048", "8,192"]
    assert cells[-6:] == [
        ("8,192", "prefill", "1.49 s", "886 ms", "× 0.300 (0.290 to 0.310)", "× 0.300"),
        ("", "our attention", "", "500 ms", "× 0.250 (0.240 to 0.260)", "× 0.250"),
        ("", "in chunks", "", "500 ms", "× 0.250 (0.240 to 0.260)", "× 0.250"),
        ("", "decode a token", "30.0 ms", "30.0 ms", "× 0.300 (0.290 to 0.310)", "× 0.300"),
        ("", "cache", "8.19 MB", "2.24 MB", "× 0.273", ""),
        ("", "memory", "8.19 MB", "8.19 MB", "× 1.00", ""),
    ]


def test_cache_without_headers_is_as_counted(sides):
    for each in sides:
        each["size"]["cache"] = None
    assert ("", "cache, as counted", "32.8 kB", "32.8 kB", "× 1.00", "") in length_cells(*sides)


def test_no_table_mixes_the_format_of_the_config_with_that_of_the_computation(sides):
    kept = [[512, 100], [2048, 300]]  # of a pattern, which is not known after 8,192 tokens
    sides[1]["size"]["cache"] = [{"bytes_per_token": 1000, "tokens": None, "kept": kept}]
    cells = [row for row in length_cells(*sides) if row[1].startswith("cache")]
    assert [row[1:4] for row in cells] == [
        ("cache, as counted", size, size) for size in ("2.05 kB", "8.19 kB", "32.8 kB")
    ]


def test_notes_tell_the_fit_and_what_was_not_tried(sides):
    assert length_notes(*sides) == [
        "prefill takes a + b·n + c·n² CPU seconds for n tokens: c 1e-08 ▶ 1e-09 (× 0.100); c·n² is half of it at "
        "10,000 ▶ 100,000 tokens",
        "32,768 tokens were not tried: it may need 9 GB of memory, 1 GB are left",
    ]
    sides[1]["latency"]["fit"] |= {"c": 0.0, "half": None, "doubt": "the rounds do not tell n² from noise"}
    assert length_notes(*sides)[0].endswith("c·n² is half of it at 10,000 ▶ no number of tokens")
    assert length_notes(*sides)[1] == "c of the result is not to be relied on: the rounds do not tell n² from noise"


def test_notes_name_what_is_faster_than_slower_stock_prompts(sides):
    rows = sides[1]["latency"]["lengths"]
    for row, ratio in zip(rows, (1.0, 1.2, 1.5), strict=True):
        row["prefill"] = timing(1.0, ratio)
    assert length_notes(*sides)[0] == (
        "stock transformers reads prompts of 2,048, 8,192 tokens slower than the original's: 8,192 tokens take × 1.50; in "
        "chunks (`prefill_chunk_size`, as `generate` reads them) × 0.250; by our attention function (`compress.load`) × 0.250"
    )
    rows[2]["paths"] = []
    assert length_notes(*sides)[0].endswith("8,192 tokens take × 1.50")


def test_notes_name_a_cache_that_is_not_as_planned(sides):
    notes = length_notes(sides[0], side(1e-9, None, 0.3, counted=7))
    assert "the result caches 519 numbers after 512 tokens, and its headers say 512" in notes


def test_reports_without_lengths_have_no_table():
    plain = {"latency": {"lengths": None, "fit": None, "not_tried": None}, "size": {"cache": None}}
    assert length_cells(plain, plain) == []
    assert length_notes(plain, plain) == []
    assert length_notes({"latency": None, "size": {}}, plain) == []


def test_pictures_have_a_line_of_each_model(sides):
    roots = [ElementTree.fromstring(standalone(draw(chart))) for chart in length_charts(*sides)]
    space = "{http://www.w3.org/2000/svg}"
    lines = [[node.get("points").split() for node in root.iter(f"{space}polyline")] for root in roots]
    assert [[len(points) for points in of] for of in lines] == [[3, 3], [3, 3]]
    texts = [node.text for root in roots for node in root.iter(f"{space}text")]
    assert {"512", "2,048", "8,192", "before", "after", "prefill of a prompt", "cache after it", "100 ms"} <= set(texts)
    heights = [float(point.split(",")[1]) for point in lines[0][0]]
    assert heights == sorted(heights, reverse=True), "longer prompts take longer"
