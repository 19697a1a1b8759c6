from pathlib import Path

import pytest

from vismem_core.errors import DataError
from vismem_core.results import Results


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (b"", set()),
        (b'{"id": "a", "text": ""}\n', {"a"}),
        (b'{"id": "a", "text": ""}\n{"id": "b', {"a"}),
        (b'{"id": "a", "text": ""}\n{"id": "b", "text": ""}', {"a"}),
        (b'{"id": "a", "text": ""}\n{"id": "\xc3', {"a"}),
    ],
)
def test_complete_rows_are_kept_and_half_ones_dropped(tmp_path: Path, before: bytes, kept: set[str]) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    path.parent.mkdir()
    path.write_bytes(before)
    with Results(path) as results:
        assert results.kept == kept
        results.add({"id": "é"})
        whole = '{"id": "a", "text": ""}\n' if kept else ""
        assert path.read_text(encoding="utf-8") == whole + '{"id": "é"}\n'  # on disk at once


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"id": 1, "text": ""}\nnotes\nmore', 2),
        ('{"id": "q", "prompt": "what ?", "answer": "boot"}\n', 1),
        ('{"id": "q", "prompt": "what ?", "answer": "boot"}', 1),
        ("notes", 1),
    ],
    ids=["notes", "questions", "one question", "a word"],
)
def test_another_file_is_not_touched(tmp_path: Path, content: str, line: int) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"notes\.txt:{line}: not an answer"):
        Results(path)
    assert path.read_text() == content


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with pytest.raises(OSError, match="No space left") as error, Results(path) as results:
        results._file = Path("/dev/full").open("w")  # noqa: SIM115
        results.add({"id": "a"})
    assert error.value.filename == str(path)
