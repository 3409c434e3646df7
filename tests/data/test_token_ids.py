"""Token ids from files and tensors."""

import numpy
import pytest
import torch
from safetensors.torch import save_file

from compress.data.token_ids import given_ids, read_ids
from compress.errors import DataError


@pytest.mark.parametrize("kind", ["int64", "int32", "uint16", ">i4"])
def test_read_ids_reads_npy(tmp_path, kind):
    ids = torch.randint(0, 300, (5, 7))
    numpy.save(tmp_path / "ids.npy", ids.numpy().astype(kind))
    read = read_ids(tmp_path / "ids.npy")
    assert read.ids.dtype == torch.int64
    assert torch.equal(read.ids, ids)
    assert read.mask is None
    assert read.chosen == tuple(f"ids.npy#{i}" for i in range(5))


def test_read_ids_reads_safetensors(tmp_path):
    a, b = torch.randint(0, 300, (5, 7)), torch.randint(0, 300, (2, 3), dtype=torch.int32)
    save_file({"only": b}, tmp_path / "one.safetensors")
    save_file({"a": a, "b": b}, tmp_path / "two.safetensors")
    save_file({"a": a, "text": b}, tmp_path / "text.safetensors")
    assert torch.equal(read_ids(tmp_path / "one.safetensors").ids, b.long())
    assert torch.equal(read_ids(str(tmp_path / "two.safetensors"), "a").ids, a)
    assert torch.equal(read_ids(tmp_path / "text.safetensors").ids, b.long())
    with pytest.raises(DataError, match=r"two.safetensors: has no tensor `text`; set `field` to one of: a, b"):
        read_ids(tmp_path / "two.safetensors")
    with pytest.raises(DataError, match=r"one.safetensors: has no tensor `a`; set `field` to one of: only"):
        read_ids(tmp_path / "one.safetensors", "a")


def npy(array):
    import io

    stream = io.BytesIO()
    numpy.save(stream, array, allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.npy", b"", "a.npy: is empty"),
        ("a.npy", b"no array at all", "a.npy: is not an array: the magic string is not correct"),
        ("a.npy", npy(numpy.zeros((4, 4), "i8"))[:-5], "a.npy: is not an array: Failed to read all data"),
        ("a.npy", npy(numpy.array([[{}]], object)), "a.npy: is not an array: Object arrays cannot be loaded"),
        (
            "a.npy",
            npy(numpy.zeros((4, 4), "f4")),
            "a.npy: holds float32, not token ids; save integers [samples, length]",
        ),
        ("a.npy", npy(numpy.zeros((4, 4), "?")), "a.npy: holds bool, not token ids"),
        ("a.npy", npy(numpy.zeros(4, "i8")), "a.npy: has the shape [4], which is not [samples, length]; save"),
        ("a.npy", npy(numpy.zeros((2, 2, 2), "i8")), "a.npy: has the shape [2, 2, 2], which is not"),
        ("a.npy", npy(numpy.zeros((0, 4), "i8")), "a.npy: holds no token: its shape is [0, 4]"),
        ("a.safetensors", b"", "a.safetensors: is empty"),
        ("a.safetensors", b"nothing like it", "a.safetensors: is damaged: "),
    ],
)
def test_read_ids_names_what_is_wrong_with_a_file(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_ids(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
def test_read_ids_refuses_missing_files(tmp_path, name):
    with pytest.raises(DataError, match=rf"{name}: there is no such file"):
        read_ids(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"{name}: (cannot be read|is damaged): "):
        read_ids(tmp_path / name)


def test_given_ids_takes_integers():
    assert given_ids(torch.ones(2, 3, dtype=torch.int32)).chosen == ("data#0", "data#1")
    for tensor, message in (
        (torch.ones(2, 3), "data: holds float32, not token ids"),
        (torch.ones(2, 3, dtype=torch.bool), "data: holds bool, not token ids"),
        (torch.ones(3, dtype=torch.long), "data: has the shape [3], which is not [samples, length]"),
    ):
        with pytest.raises(DataError) as caught:
            given_ids(tensor)
        assert message in str(caught.value)
