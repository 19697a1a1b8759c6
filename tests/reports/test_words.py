"""What people read: one clear line for what is damaged, misspelt, in another encoding, or written by two at once."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bases import mini
from runs import read, rows, run, written

import vismem_core as vismem
from vismem_cli import main
from vismem_cli.report import print_report
from vismem_core.answers.inference import Answer
from vismem_core.answers.picture import draw
from vismem_core.answers.reward import Written, parse, score
from vismem_core.base.loading import load_base
from vismem_core.errors import AttachError, ConfigError, DataError, RewardError, TrainingError, VismemError
from vismem_core.files.lock import alone
from vismem_core.files.results import Results
from vismem_core.files.samples import Sample, question
from vismem_plugins.metrics.text import exact
from vismem_plugins.mini import path as shipped

# Texts that look the same


@pytest.mark.parametrize("reward", ["exact", "substring", "f1"])
def test_accents_are_the_same_however_they_are_written(reward: str) -> None:
    composed, apart = (unicodedata.normalize(form, "Crème brûlée, Ångström") for form in ("NFC", "NFD"))
    assert composed != apart
    for wanted, told in ((composed, apart), (apart, composed)):
        assert score(parse([reward]), [Written(told)], [Sample("a", (), "?", wanted)]) == [1.0]
        assert exact([told], [Sample("a", (), "?", wanted)]) == [1.0]
    assert score(parse([reward]), [Written("Creme brulee, Angstrom")], [Sample("a", (), "?", composed)]) != [1.0]


def test_accents_of_options_too() -> None:
    prompt = unicodedata.normalize("NFC", "which ?\nA. crème brûlée\nB. soup")
    told = unicodedata.normalize("NFD", "I think crème brûlée")
    assert score(parse(["choice"]), [Written(told)], [Sample("a", (), prompt, "A")]) == [1.0]


# Two at once


def test_the_second_to_write_a_file_says_so(tmp_path: Path) -> None:
    with Results(tmp_path / "answers.jsonl", {"memory": "m"}) as first:
        first.add({"id": "a", "question": "q", "text": "t"})
        with pytest.raises(VismemError, match=r"answers\.jsonl: another program is writing to it"):
            Results(tmp_path / "answers.jsonl", {"memory": "m"})
    with Results(tmp_path / "answers.jsonl", {"memory": "m"}) as again:
        assert again.kept == {"a": "q"}
    assert [place.name for place in tmp_path.iterdir()] == ["answers.jsonl"]


def test_a_results_file_that_is_refused_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("my thesis\n")
    for _ in range(2):
        with pytest.raises(DataError, match="not an answer"):
            Results(tmp_path / "mine.txt", {})


HOLD = "import sys, time; from pathlib import Path; from vismem_core.files.lock import alone\n"
HOLD += "with alone(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"


def test_a_killed_program_gives_its_place_up(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline() == "mine\n"
    with pytest.raises(VismemError, match="another program"), alone(tmp_path / "x"):
        pass
    child.kill()
    child.wait()
    with alone(tmp_path / "x"):
        pass


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with alone(tmp_path / "run" / "run"), pytest.raises(VismemError, match="another program is writing"):
        run(tmp_path / "run")
    run(tmp_path / "run")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_models_that_share_a_processor(order: tuple[int, int]) -> None:
    one, two = mini(), mini()
    memories = [
        vismem.attach(model, one.processor, shipped("qwen2_5_vl") / "memory") for model in (one.model, two.model)
    ]
    assert memories[0].tokens.first == memories[1].tokens.first
    asked = question("what is most frequent ?", [Path("plugins/vismem_plugins/samples/mosaic.png").resolve()])
    told = []
    for memory in memories:
        inputs = memory.backbone.inputs([asked.prompt], [asked.load_images()])
        told.append(memory.model.generate(**inputs, max_new_tokens=4).tolist())
    assert told[0] == told[1]
    memories[order[0]].detach()
    left = memories[order[1]]
    assert left.model.generate(**inputs, max_new_tokens=4).tolist() == told[0] and len(left.trace)


@pytest.mark.parametrize("first", [0, 1])
def test_a_processor_that_serves_vocabularies_of_two_sizes(first: int) -> None:
    from tiny import qwen

    small, processor = qwen()
    large, _ = qwen(spare=50)
    models = (small, large) if first == 0 else (large, small)
    memories = [vismem.attach(model, processor) for model in models]
    firsts = {id(own.model): own.tokens.first for own in memories}
    assert firsts[id(large)] == firsts[id(small)] + 50


# Damaged files


def broken(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        shutil.copytree(shipped("qwen2_5_vl"), place, ignore=shutil.ignore_patterns("memory"))
        (place / name).write_bytes(edit((place / name).read_bytes()))
        return place

    return make


BASES = {
    "cut-off weights": broken("model.safetensors", lambda own: own[: len(own) // 2]),
    "empty weights": broken("model.safetensors", lambda own: b""),
    "garbage for weights": broken("model.safetensors", lambda own: b"\xff" * 1000),
    "cut-off config": broken("config.json", lambda own: own[:50]),
    "a list for a config": broken("config.json", lambda own: b"[]"),
    "cut-off tokenizer": broken("tokenizer.json", lambda own: own[: len(own) // 2]),
    "empty tokenizer": broken("tokenizer.json", lambda own: b"{}"),
    "cut-off processor": broken("processor_config.json", lambda own: own[:30]),
}


@pytest.mark.parametrize("name", BASES)
def test_a_damaged_base_is_one_line_that_names_it(name: str, tmp_path: Path) -> None:
    place = BASES[name](tmp_path / "base")
    with pytest.raises(VismemError) as error:
        model, processor, _ = load_base(None, str(place))
        vismem.attach(model, processor).backbone.inputs(["?"], [[]])
    assert "\n" not in str(error.value)
    assert str(place) in str(error.value)


RUNS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "cut-off settings": ("config.json", lambda own: own[: len(own) // 2]),
    "a list for settings": ("config.json", lambda own: b"[1]"),
    "binary settings": ("config.json", lambda own: b"\xff\xfe\x00"),
    "cut-off report": ("report.json", lambda own: own[: len(own) // 2]),
    "empty report": ("report.json", lambda own: b""),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(output)
    return output


@pytest.mark.parametrize("name", RUNS)
def test_a_damaged_run_is_one_line_that_names_the_file(name: str, tmp_path: Path, finished: Path) -> None:
    file, edit = RUNS[name]
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / file).write_bytes(edit((finished / file).read_bytes()))
    with pytest.raises(TrainingError, match=rf"run/{file}: damaged \(.*\); restore it, or begin anew"):
        run(tmp_path / "run", resume=True)


@pytest.mark.parametrize("edit", [lambda told: "{", lambda told: "[]", lambda told: json.dumps({}),
                                  lambda told: json.dumps(told | {"base": 3}),
                                  lambda told: json.dumps(told | {"data": {}}),
                                  lambda told: json.dumps(told | {"processes": "two"})])  # fmt: skip
def test_a_damaged_record_of_base_and_data(edit: Any, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    told = json.loads((finished / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(edit(told))
    with pytest.raises(TrainingError, match=r"run/run\.json: damaged"):
        run(tmp_path / "run", resume=True)


# Encodings


def infer(tmp_path: Path, encoding: str, *args: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "vismem_cli", "infer", *args]
    return subprocess.run(
        command, capture_output=True, cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": encoding}, check=False
    )


def test_an_answer_is_shown_in_any_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    from io import TextIOWrapper

    from vismem_cli.console import print_json

    for encoding in ("ascii", "latin-1"):
        stream = TextIOWrapper(os.fdopen(os.dup(1), "wb"), encoding=encoding, write_through=True)
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as ended:
            main(["infer"])
        stream.flush()
        assert not ended.value.code
        assert b"short? " in capfdbinary.readouterr().out
        print_json({"text": "‹short› crème"})
        stream.flush()
        assert json.loads(capfdbinary.readouterr().out) == {"text": "‹short› crème"}


def test_a_picture_of_a_text_with_dollars(tmp_path: Path) -> None:
    prompt = r"price of $\frac{a}{ and $5 ?"
    answer = Answer("a", "$x^", (), "‹short› $x^{ $", 3)
    draw(answer, Sample("a", (), prompt), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_reports_keep_their_figures_in_one_piece(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from vismem_cli import console

    monkeypatch.setattr(console, "out", Console(width=80, highlight=False))
    ways = ("base", "memory", "noise", "blind", "short", "long", "blind_base")
    name = "visual-commonsense-reasoning/what-is-to-the-right-of-the-person"
    print_report({"heldout": {way: {name: 0.125, "read": 0.5} for way in ways}, "questions": {name: 100, "read": 100}})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    figures = [line.split() for line in lines if "0.125" in line]
    assert [words.count("0.125") for words in figures] == [7]
    assert lines[1].split() == ["accuracy", "n", *ways]
    assert "".join(line[:20].strip() for line in lines[2:] if "0.500" not in line and "mean" not in line).startswith(
        "visual"
    )


# Names, files and signals


@pytest.mark.parametrize("dtype", ["fp16", "half", "int8", "Tensor", ""])
def test_precisions_are_named(dtype: str) -> None:
    with pytest.raises(AttachError, match="one of auto, float32, bfloat16, float16"):
        load_base("qwen2_5_vl", dtype=dtype)


def test_a_path_that_no_file_system_takes(tmp_path: Path) -> None:
    told = rows(tmp_path / "data")
    told[1]["image"] = "a b " * 1000
    with pytest.raises(DataError, match=r"q\.jsonl:2: no such image"):
        read(written(tmp_path / "data" / "q.jsonl", told))
    with pytest.raises(DataError, match="no such image"):
        question("?", [Path("x" * 5000)])
    from vismem_core.files.samples import open_dataset

    with pytest.raises(DataError, match="neither a file nor a data set"):
        open_dataset("x" * 5000, "train")


def test_compressed_files_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "data" / "q.jsonl", rows(tmp_path / "data"))
    (tmp_path / "data" / "q.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [own.prompt for own in read(tmp_path / "data" / "q.jsonl.gz")] == [own.prompt for own in read(path)]
    (tmp_path / "data" / "cut.gz").write_bytes(gzip.compress(path.read_bytes())[:100])
    with pytest.raises(DataError, match=r"cut\.gz: is compressed by gzip and damaged"):
        read(tmp_path / "data" / "cut.gz", on_bad="skip")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"id": "a", "prompt": "wh', "Unterminated string starting at column 23, perhaps cut off"),
        ('{"id": "a",', "perhaps cut off"),
        ('{"id": a}', r"Expecting value at column 8;"),
        ("{", "one JSON value over several lines"),
        ('{"id": ', "Expecting value at column 8, perhaps cut off"),
    ],
)
def test_lines_that_are_no_json_say_where(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "q.jsonl").write_text(text + "\n")
    with pytest.raises(DataError, match=rf"q\.jsonl:1: not JSON: .*{told}"):
        read(tmp_path / "q.jsonl")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    mark = "" if encoding == "utf-16" else "\ufeff"
    (tmp_path / "q.jsonl").write_bytes((mark + json.dumps({"id": "a"}) + "\n").encode(encoding))
    with pytest.raises(DataError, match=r"q\.jsonl: is UTF-16; convert it to UTF-8"):
        read(tmp_path / "q.jsonl")
    path = written(tmp_path / "data" / "q.jsonl", rows(tmp_path / "data"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a mark that UTF-8 does not need
    assert len(read(path)) == 8


def test_ctrl_c_at_any_moment_is_one_line() -> None:
    """While Python itself starts it is Python's; from our first line on it is ours."""
    code = "from vismem_cli import main; print('on', flush=True); main(['infer'])"
    for pause in (0.0, 0.05, 0.2, 0.6):
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert child.stdout and child.stdout.readline() == "on\n"
        time.sleep(pause + 0.03)
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=60)
        assert child.returncode == 130, told
        assert "Traceback" not in told and told.splitlines()[-1] == "error: interrupted"


def test_ctrl_c_that_a_library_swallows_ends_in_its_code() -> None:
    code = """
import os, signal, sys, types
from vismem_cli.app import OWN
from vismem_cli.program import run

def deaf() -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        print("what interrupt ?")

sys.modules["vismem_cli.deaf"] = types.SimpleNamespace(deaf=deaf, EXAMPLE="")
OWN["deaf"] = ("deaf:deaf", "Hears nothing.")
run(["deaf"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "what interrupt ?\n")
    assert done.stderr.splitlines()[-1] == "error: interrupted"


# Rewards of one's own


def trl(completions: list[str], **kwargs: Any) -> list[float]:
    assert set(kwargs) == {"prompts", "completion_ids", "id", "answer", "type", "references"}
    return [float(text == answer) for text, answer in zip(completions, kwargs["answer"], strict=True)]


def trl_named(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


def ours(answers: Any, samples: Any) -> list[float]:
    return [float(own.text == sample.answer) for own, sample in zip(answers, samples, strict=True)]


def needs_more(completions: list[str], solution: list[str]) -> list[float]:
    return []


def one(text: str) -> float:
    return 1.0


async def later(answers: Any, samples: Any) -> list[float]:
    return []


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "own_rewards", sys.modules[__name__])
    return "own_rewards"


@pytest.mark.parametrize("name", ["trl", "trl_named", "ours"])
def test_rewards_are_called_by_their_parameters(name: str, module: str) -> None:
    samples = [Sample("a", (), "?", "bag", "t"), Sample("b", (), "?", "boot")]
    assert score(parse([f"call:{module}:{name}"]), [Written("bag", (1,)), Written("coat")], samples) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [("needs_more", "takes 'solution', which samples do not have"), ("one", "neither"), ("later", "asynchronous")],
)
def test_rewards_that_could_not_be_called_are_refused(name: str, message: str, module: str) -> None:
    with pytest.raises(ConfigError, match=rf"call:{module}:{name} .*{message}"):
        parse([f"call:{module}:{name}"])


def test_trls_none_is_refused(module: str) -> None:
    samples = [Sample("a", (), "?", "bag")]
    with pytest.raises(RewardError):
        score(lambda answers, samples: [None], [Written("bag")], samples)  # type: ignore[arg-type,list-item]
