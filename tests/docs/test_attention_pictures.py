"""The pictures of attention follow the rules of the attention function, and are well formed."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch

from compress.checkpoint.attention.patterns import LocalPattern, visible
from tools.docs.attention import PANELS, SINKS, TOKENS, WINDOW, pictures

RULES = {
    "full": LocalPattern(),
    "window": LocalPattern(window=WINDOW),
    "sinks": LocalPattern(window=WINDOW, sinks=SINKS),
    "strided": LocalPattern(window=WINDOW, last=1, period=WINDOW),
    "strided_back": LocalPattern(window=WINDOW, stride=WINDOW),
    "strided_block": LocalPattern(block=WINDOW, stride=WINDOW),
    "fixed": LocalPattern(block=WINDOW, last=1),
    "chunks": LocalPattern(block=WINDOW),
}


@pytest.mark.parametrize("name", PANELS)
def test_pictures_show_what_the_attention_function_sees(name: str) -> None:
    drawn = [[j <= i and PANELS[name].reason(i, j) is not None for j in range(TOKENS)] for i in range(TOKENS)]
    places = torch.arange(TOKENS)
    assert drawn == visible(RULES[name], places[:, None], places[None]).tolist()


@pytest.mark.parametrize("name", pictures())
def test_pictures_are_well_formed(name: str) -> None:
    root = ElementTree.fromstring(pictures()[name])
    width, height = int(root.attrib["width"]), int(root.attrib["height"])
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        assert 0 <= float(text.attrib["x"]) < width
        assert 0 < float(text.attrib["y"]) < height
