"""Rows are read where they stand: what is kept of them, what is told of bad ones, what happens when a file changes."""

from __future__ import annotations

import gzip
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from vismem_core.errors import DataError
from vismem_core.files.samples import Sample, read
from vismem_core.files.standing import _alike

ROWS = [
    {"id": f"ü{at}", "prompt": f"what is at {at} ?\n", "answer": str(at), "type": "ab"[at % 2]} for at in range(150)
]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / name
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if name.endswith(".jsonl"):
        path.write_text("\n" + lines)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    elif name.endswith(".csv"):
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    elif name.endswith(".parquet"):
        from pyarrow import Table, parquet

        columns = Table.from_pylist(rows)
        kinds = columns.column("type").dictionary_encode()
        parquet.write_table(columns.set_column(3, "type", kinds), path, row_group_size=50)
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


KINDS = ("a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "saved")


@pytest.mark.parametrize("name", KINDS)
def test_any_row_is_read_at_any_time(name: str, tmp_path: Path) -> None:
    data = read(write(tmp_path, name, ROWS), need_answer=True)
    expected = [Sample(row["id"], (), row["prompt"], row["answer"], row["type"]) for row in ROWS]
    assert [data[at] for at in (149, 3, 64, 63, 50, -1)] == [expected[at] for at in (149, 3, 64, 63, 50, -1)]
    assert list(data) == expected
    assert list(data[10:20:3]) == expected[10:20:3] and list(data[140:][-3:]) == expected[-3:]
    assert [data.type_of(at) for at in (0, 1, 2)] == ["a", "b", "a"]
    assert data.only(data[5:7]).type_of(0) == "b"


@pytest.mark.parametrize("name", KINDS)
def test_what_is_wrong_is_known_when_the_data_is_opened(name: str, tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    rows[40]["id"] = rows[149]["id"] = rows[7]["id"]
    rows[120]["prompt"] = " "
    path = write(tmp_path, name, rows)
    data = read(path, need_answer=True, on_bad="skip")
    assert len(data) == 147 and [own.line for own in data.skipped] == sorted(own.line for own in data.skipped)
    same, blank, last = (own.reason for own in data.skipped)
    assert "the id 'ü7' is taken by line" in same and "'prompt' must be" in blank and same == last
    line = {own.id: own.place for own in data}["ü7"].rpartition(":")[2]
    assert f"taken by line {line};" in same
    with pytest.raises(DataError, match=f":{data.skipped[0].line}: the id 'ü7' is taken"):
        read(path, need_answer=True)
    assert data[146].id == "ü148" and data[40].id == "ü41"


def test_bad_rows_of_one_line_are_all_told(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": 1, "prompt": "?"}, {"id": 2}, {"id": 3}]))
    assert [own.line for own in read(path, need_answer=False, on_bad="skip").skipped] == [1, 1]


def test_equal_hashes() -> None:
    from array import array

    assert list(_alike(array("q", [5, 3, 5, 9, 3, 5]))) == [[1, 4], [0, 2, 5]]
    assert list(_alike(array("q", [1]))) == list(_alike(array("q"))) == []


def test_a_file_that_changes_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", ROWS)
    data = read(path, need_answer=True)
    os.replace(write(tmp_path, "b.jsonl", ROWS[:2]), path)
    assert data[149].answer == "149"  # another file of this name is not the one that was opened
    data = read(path, need_answer=True)
    path.write_text("{}\n")
    with pytest.raises(DataError, match=r"a\.jsonl:3: .*a\.jsonl: changed while it was used"):
        data[1]


def test_threads_read_at_once(tmp_path: Path) -> None:
    data = read(write(tmp_path, "a.jsonl", ROWS), need_answer=True)
    found: list[bool] = []

    def look() -> None:
        found.append(all(data[at].answer == str(at) for at in range(150)))

    threads = [threading.Thread(target=look) for _ in range(4)]
    [own.start() for own in threads]
    [own.join() for own in threads]
    assert found == [True] * 4


def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    from vismem_core.files import tables, texts

    for module in (texts, tables):
        monkeypatch.setattr(module, "UNPACKED", 1000)
        monkeypatch.setattr(module, "PACKED", 2)
    monkeypatch.setattr(texts, "LONGEST", 300)


SAME = [{"id": str(at), "prompt": "?" * 200} for at in range(2000)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_what_grows_without_measure_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits(monkeypatch)
    rows = [row | {"answer": "x", "type": "t"} for row in SAME]
    with pytest.raises(DataError, match="unpacks to more than 2 times its size"):
        read(write(tmp_path, name, rows), need_answer=False)


def test_a_row_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits(monkeypatch)
    with pytest.raises(DataError, match=r"a\.jsonl:2: is longer than 300 bytes"):
        read(write(tmp_path, "a.jsonl", [{"id": "x" * 1000, "prompt": "?"}]), need_answer=False)


def test_folders_of_datasets_that_name_files_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path, "saved", ROWS)
    state = json.loads((path / "state.json").read_text())
    os.rename(path / state["_data_files"][0]["filename"], tmp_path / "out.arrow")
    state["_data_files"][0]["filename"] = "../out.arrow"
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="saved: names parts that lie outside it"):
        read(path, need_answer=True)
    (path / "state.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="saved: is damaged"):
        read(path, need_answer=True)
