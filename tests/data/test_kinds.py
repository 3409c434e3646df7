"""Kinds of files by their names."""

from compress.data.kinds import kind, refusal


def test_kind_and_refusal_follow_from_the_name():
    assert [kind(n) for n in ("a.txt", "b.x.JSONL.gz", "c.gz", "d", "e.npy")] == [".txt", ".jsonl", "", "", ".npy"]
    assert refusal("a.npy", ids=True) is None
    assert refusal("a.csv.zst", ids=True) is None
    assert refusal("README", ids=True).endswith("file (`README`)")
