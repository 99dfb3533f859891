from __future__ import annotations

from typing import Any

import pytest

from cloudckpt.core.folder import files_in, folder_value, path_problem, stored_files
from cloudckpt.core.model import Chunk, TensorEntry
from cloudckpt.errors import FormatError
from cloudckpt.testing.builders import index


def row(start: int, length: int) -> TensorEntry:
    """A file's bytes, as the index tells them."""
    chunk = Chunk(
        object="folder-00000-of-00001.safetensors",
        start=start,
        length=length,
        offsets=(0,),
        lengths=(length,),
        crc32c=start,
    )
    return TensorEntry(dtype="uint8", shape=(length,), chunks=(chunk,))


@pytest.mark.parametrize("path", ["config.json", "a/b/c.bin", "größe", "with space", "a..b", "...", "$tensor", "a:b"])
def test_paths_inside_of_the_folder_can_be(path: str) -> None:
    """Relative paths of printable names are paths of files, and come back."""
    assert path_problem(path) is None
    assert files_in(folder_value({path: 7}), "run") == {path: 7}


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a/", "./a", "a\\b", "a\0b", "a\nb"]
)
def test_paths_that_lead_elsewhere_cannot_be(path: str) -> None:
    """What could leave the folder, or a terminal, is refused with the path and the reason."""
    assert path_problem(path) is not None
    with pytest.raises(FormatError, match="cannot be given back") as refused:
        files_in(folder_value({path: 7}), "run")
    assert repr(path) in str(refused.value)


def test_a_file_is_no_folder_of_another() -> None:
    """Two paths of which one is the other's folder are refused: no disk holds both."""
    assert files_in(folder_value({"a/b": 1, "a/c": 2, "ab": 3}), "run") == {"a/b": 1, "a/c": 2, "ab": 3}
    with pytest.raises(FormatError, match="'a/b' is a file and the folder of 'a/b/c'"):
        files_in(folder_value({"a/b/c": 1, "a/b": 2}), "run")


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"folder": 1},
        {"folder": 2, "files": {}},
        {"folder": True, "files": {}},
        {"folder": 1, "files": []},
        {"folder": 1, "files": {}, "more": 0},
        ["folder", "files"],
    ],
)
def test_anything_else_is_no_folder(value: Any) -> None:
    """A component of that name which somebody saved as plain values is told apart, and named."""
    with pytest.raises(FormatError, match=r"s3://b/run/x was not saved from a folder"):
        files_in(value, "s3://b/run/x")
    assert stored_files(index(structure={"folder": value}), "run") is None
    assert stored_files(index(structure={}), "run") is None


def test_a_path_is_text() -> None:
    """A key that is no text, which only a hostile index has, is refused."""
    with pytest.raises(FormatError, match="it is no text"):
        files_in(folder_value({7: 1}), "run")  # type: ignore[dict-item]  # what is tested


def test_the_index_says_where_each_file_lies() -> None:
    """Without torch: path -> the entry of its bytes, whatever its name in the index is."""
    entries = {"files.a": row(0, 3), "files.b/c~1": row(64, 0)}
    plain = {"a": {"$tensor": "files.a"}, "b/c": {"$tensor": "files.b/c~1"}}
    pairs = {"$dict": [["$a", {"$tensor": "files.a"}]]}
    tensors = {"folder": entries}
    found = stored_files(index(structure={"folder": {"folder": 1, "files": plain}}, tensors=tensors), "run")
    assert found == {"a": row(0, 3), "b/c": row(64, 0)}
    found = stored_files(index(structure={"folder": {"folder": 1, "files": pairs}}, tensors=tensors), "run")
    assert found == {"$a": row(0, 3)}
    assert stored_files(index(structure={"folder": {"folder": 1, "files": {}}}, tensors={}), "run") == {}


@pytest.mark.parametrize(
    "files",
    [
        {"a": {"$tensor": "files.z"}},
        {"a": {"$tensor": ["files.a"]}},
        {"a": {"$int": "0x1"}},
        {"a": 7},
        {"$dict": [["a"]]},
        {"$dict": [[["a"], {"$tensor": "files.a"}]]},
        {"$dict": 7},
    ],
)
def test_a_file_without_bytes_is_refused(files: Any) -> None:
    """An index whose references lead nowhere is malformed, and says so instead of losing a file."""
    structure = {"folder": {"folder": 1, "files": files}}
    with pytest.raises(FormatError, match="has no bytes in the index"):
        stored_files(index(structure=structure, tensors={"folder": {"files.a": row(0, 3)}}), "run")


def test_a_path_that_leads_elsewhere_is_refused_from_the_index_as_well() -> None:
    """The reader without torch holds to the same rules."""
    structure = {"folder": {"folder": 1, "files": {"../a": {"$tensor": "files.a"}}}}
    with pytest.raises(FormatError, match="cannot be given back"):
        stored_files(index(structure=structure, tensors={"folder": {"files.a": row(0, 3)}}), "run")
