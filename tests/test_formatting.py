from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.formatting import apart, fixed, format_bytes, percent, ratio, seconds_text, signed_percent, significant


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (34.0, "34.0"), (26.61, "26.6"), (9.996, "10.0"), (999.6, "1,000"), (1234.5, "1,234"), (0.5387, "0.539"), (0, "0.00"),
        (-0.00012, "-0.000120"), (1.5e-9, "1.50e-09"), (1e20, "1.00e+20"), (math.nan, "nan"), (-math.inf, "-inf"),
    ],
)  # fmt: skip
def test_significant_keeps_zeros_at_the_end(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.68, "1.6800"), (0.00032, "0.00032"), (0.0123, "0.0123"), (0.00009994, "0.00010"), (0, "0.0000"), (1234.5, "1,234.5000"), (1e300, "1.0e+300")],
)  # fmt: skip
def test_fixed_shows_only_zero_as_zero(value, text):
    assert fixed(value, 4) == text


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 6))
def test_texts_are_as_near_as_their_digits(value, digits):
    read = float(significant(value, digits).replace(",", ""))
    assert abs(read - value) <= abs(value) * 0.5001 * 10 ** (1 - digits) + 1e-307 or math.isinf(read)
    assert (float(fixed(value, digits).replace(",", "")) == 0) == (value == 0) or abs(value) < 1e-300


def test_units():
    assert [format_bytes(n) for n in (999, 8_139_152, 30_000_000, 999_999)] == [
        "999 B",
        "8.14 MB",
        "30.0 MB",
        "1,000 kB",
    ]
    assert [seconds_text(s) for s in (0.034, 0.0266, 1.5)] == ["34.0 ms", "26.6 ms", "1.50 s"]
    assert (percent(0.716), signed_percent(0.04071), signed_percent(-1e-6)) == ("71.60%", "+4.07%", "-0.00010%")
    assert ratio(1.0) == "× 1.00"


def test_apart_gives_digits_until_two_numbers_differ():
    assert apart(0.5387, 0.7, significant) == ("0.539", "0.700")
    assert apart(0.53904, 0.539, significant) == ("0.53904", "0.53900")
    assert apart(0.5, 0.5, significant) == ("0.500", "0.500")
