import json
from pathlib import Path

import pytest

from vismem_core.errors import DataError
from vismem_core.files.results import Results
from vismem_core.files.samples import Sample

MADE = {"memory": "1f", "trigger": "policy"}
ROW = json.dumps({"id": "a", "text": "", "question": "q", "made": MADE}).encode()


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (b"", {}),
        (ROW + b"\n", {"a": "q"}),
        (ROW + b'\n{"id": "b', {"a": "q"}),
        (ROW + b"\n" + ROW.replace(b'"a"', b'"b"'), {"a": "q"}),
        (ROW + b'\n{"id": "\xc3', {"a": "q"}),
    ],
)
def test_complete_rows_are_kept_and_half_ones_dropped(tmp_path: Path, before: bytes, kept: dict[str, str]) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    path.parent.mkdir()
    path.write_bytes(before)
    with Results(path, MADE) as results:
        assert results.kept == kept
        results.add({"id": "é", "text": "", "question": "p"})
        first, *added = [b"", *path.read_bytes().splitlines()] if not kept else path.read_bytes().splitlines()
        assert first == (ROW if kept else b"")
        assert [json.loads(line) for line in added] == [
            {"id": "é", "text": "", "question": "p", "made": MADE}
        ]  # on disk at once
    with Results(path, MADE) as results:
        assert results.kept == kept | {"é": "p"}


def test_an_id_that_asks_something_else_now_is_told(tmp_path: Path) -> None:
    path, image = tmp_path / "answers.jsonl", tmp_path / "image.png"
    image.write_bytes(b"one")
    asked = [Sample(name, (image,), "what is it ?") for name in "ab"]
    with Results(path, MADE) as results:
        results.add({"id": "a", "text": "", "question": asked[0].digest()})
        results.kept["a"] = asked[0].digest()
        assert list(results.left(asked)) == asked[1:]
        with pytest.raises(DataError, match=r"answers\.jsonl: 'a' answers another prompt or image"):
            results.left([Sample("a", (image,), "what is below ?")])
        image.write_bytes(b"two")
        with pytest.raises(DataError, match=r"'a' answers another prompt or image"):
            results.left(asked)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (MADE | {"trigger": "never"}, r"1: answered with trigger 'policy', not 'never'; choose another output file"),
        ({"trigger": "policy"}, r"1: answered with memory '1f', not None"),
    ],
)
def test_answers_made_otherwise_are_not_mixed(tmp_path: Path, made: dict[str, str], message: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(ROW + b"\n")
    with pytest.raises(DataError, match=rf"answers\.jsonl:{message}"):
        Results(path, made)
    assert path.read_bytes() == ROW + b"\n"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (f"{ROW.decode()}\nnotes\nmore", 2),
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
        Results(path, MADE)
    assert path.read_text() == content


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with pytest.raises(OSError, match="No space left") as error, Results(path, MADE) as results:
        results._file = Path("/dev/full").open("w")  # noqa: SIM115
        results.add({"id": "a"})
    assert error.value.filename == str(path)
