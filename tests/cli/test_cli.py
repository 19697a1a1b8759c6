"""The program from outside: exit codes, what goes to stdout and what to stderr, and what reaches the core."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
from typer.testing import CliRunner

import vismem_core.showing.page  # whole, before parts of it are replaced
from vismem_cli import main
from vismem_cli.app import app
from vismem_core import plugins
from vismem_core.config import Config, MemoryConfig, TrainConfig, to_dict
from vismem_core.errors import TrainingError
from vismem_core.files.samples import read
from vismem_core.memory.trace import Trace

COMMANDS = ("train", "infer", "eval", "serve", "plugins", "backbones")
EMPTY = hashlib.sha256(b"").hexdigest()[:16]
PLUGIN = """
from vismem_core.hookspecs import hookimpl

@hookimpl
def register_commands(register):
    register("greet", "vm_greet:greet", description="Says hello.")
    register("lost", "not_installed:app", description="Is not there.")
    register("train", "vm_greet:greet")

def greet(name: str) -> None:
    print("hello", name)
"""


@dataclass
class Run:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def vismem(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Runs the program in this process."""

    def run(*args: object) -> Run:
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return Run(int(end.value.code or 0), out, err)

    return run


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A process environment with two more plugins installed: one that works, one that cannot be imported."""
    for name, source in {"greet": PLUGIN, "broken": "import not_installed"}.items():
        (tmp_path / f"vm_{name}.py").write_text(source)
        info = tmp_path / f"vm_{name}-2.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vm_{name}\nVersion: 2.0\n")
        (info / "entry_points.txt").write_text(f"[vismem]\n{name} = vm_{name}\n")
    places = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": places, "COLUMNS": "200"}


def process(environment: dict[str, str], *args: str) -> Run:
    command = [sys.executable, "-c", "from vismem_cli import main; main()", *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return Run(done.returncode, done.stdout, done.stderr)


def test_version_and_help_survive_a_broken_plugin_and_import_nothing_heavy(environment: dict[str, str]) -> None:
    assert process(environment, "--version").out.startswith("vismem 0.")
    code = """import sys, vismem_cli
try: vismem_cli.main(["--help"])
finally: print({"torch", "numpy", "PIL", "yaml", "vismem_cli.train"} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.endswith("set()\n")
    assert "Says hello." in done.stdout
    assert done.stdout.count("│ train ") == 1
    assert "the command 'train' of vm_greet is hidden" in done.stderr


@pytest.mark.long
def test_nothing_stands_between_the_lines_of_an_answer() -> None:
    done = process(dict(os.environ), "infer")
    assert done.code == 0 and len(done.out.splitlines()) == 1
    assert [line.split()[0] for line in done.err.splitlines()] == ["image", "prompt", "memory", "right"]


@pytest.mark.long  # all that can be imported is
def test_doctor_says_what_loads_and_what_does_not(environment: dict[str, str]) -> None:
    sick, well = process(environment, "doctor", "--json"), process(dict(os.environ), "doctor", "--json")
    assert (sick.code, well.code) == (1, 0)
    assert sick.json["broken"] == ["broken", "lost"] and well.json["broken"] == []
    faults = {own["name"]: own["error"] for own in sick.json["plugins"] if own["error"]}
    assert "not_installed" in faults["broken"] and "lost" in faults["lost"]
    versions = {own["name"].lower(): own["version"] for own in well.json["packages"]}
    assert versions["torch"] == version("torch") and versions["peft"] == version("peft")
    assert {own["kind"] for own in well.json["plugins"]} == {"loaded"}
    assert next(own["count"] for own in well.json["plugins"] if own["name"] == "formers") == 6


def test_plugins_shows_what_is_broken(environment: dict[str, str]) -> None:
    done = process(environment, "plugins", "--json")
    states = {plugin["name"]: plugin for plugin in done.json["plugins"]}
    assert (done.code, done.err) == (0, "")
    assert states["plugins"]["ok"]
    assert states["greet"]["registers"] == {"commands": ["greet", "lost", "train"]}
    assert (states["broken"]["ok"], states["broken"]["version"]) == (False, "2.0")
    assert "No module named 'not_installed'" in states["broken"]["error"]
    assert "did not load: ModuleNotFoundError" in process(environment, "plugins").out


def test_commands_of_plugins(environment: dict[str, str]) -> None:
    assert process(environment, "greet", "you").out == "hello you\n"
    assert process(environment, "greet").code == 2
    lost = process(environment, "lost")
    assert (lost.code, lost.out) == (1, "")
    assert lost.err.startswith("error: command 'lost' of vm_greet 2.0 does not load: not_installed:app")


def test_program_is_installed_and_fails_in_one_line() -> None:
    program = Path(sys.executable).parent / "vismem"
    done = subprocess.run([program, "train", "--set", "trian.seed=1"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: 'trian.seed=1': unknown key 'trian'; did you mean 'train'?\n"


def test_backbones(vismem: Callable[..., Run]) -> None:
    rows = {row["name"]: row for row in vismem("backbones", "--json").json["backbones"]}
    row = rows["qwen2_5_vl"]
    assert row["facts"]["model_types"] == ["qwen2_5_vl"]
    assert row["facts"]["families"] == ["Qwen2.5-VL"]
    assert row["embedded"] is True
    for own in rows.values():
        assert (own["distribution"], own["version"]) == ("vismem", version("vismem"))
        assert own["facts"]["families"] and own["facts"]["features"], own["name"]
        assert own["facts"].get("model_types") or own["facts"]["fallback"], own["name"]
    assert "qwen2_5_vl" in vismem("backbones").out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_in_an_example(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], terminal_width=200).stdout.strip()
    assert f"Example: vismem {command}" in shown.splitlines()[-1] or f"Example: vismem {command}" in shown[-200:]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["trian"], 2, "No such command"),
        (["train", "--stage", "third"], 2, "error: Invalid value for '--stage': 'third' is not one of"),
        (["train", "--seed", "-1"], 2, "--seed"),
        (["train", "--model", "some/model"], 2, "--data"),
        (["infer", "--data", "x.jsonl"], 2, "go together"),
        (["infer", "--data", "x.jsonl", "--output", "y.jsonl", "--prompt", "?"], 2, "either --data"),
        (["infer", "--memory", "somewhere"], 2, "--prompt"),
        (["train", "--data", "mosiac"], 1, "error: mosiac: neither a file nor a data set; did you mean 'mosaic'?"),
        (["train", "--config", "none.yaml"], 1, "error: none.yaml: cannot be read: No such file or directory"),
        (["train", "--backbone", "qwen2_vl"], 1, "error: unknown backbone 'qwen2_vl'; did you mean 'qwen2_5_vl'?"),
        (["infer", "--image", "none.png", "--prompt", "?"], 1, "error: no such image: none.png"),
    ],
)
def test_wrong_usage_is_2_and_bad_input_is_1(
    vismem: Callable[..., Run], args: list[str], code: int, message: str
) -> None:
    done = vismem(*args)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert code == 1 or f"; see vismem{' ' + args[0] if args[0] in COMMANDS else ''} --help\n" in done.err


@dataclass
class Core:
    """Stands for the parts of the core that need a model; records what it is asked."""

    calls: dict[str, Any] = field(default_factory=dict)
    answered: list[str] = field(default_factory=list)
    error: BaseException | None = None

    def load_base(self, backbone: str | None, model: str | None, **how: Any) -> tuple[Any, Any, str]:
        self.calls["load_base"] = (backbone, model, how)
        model = SimpleNamespace(device=SimpleNamespace(type="meta"), parameters=list)
        return model, self, backbone or "qwen2_5_vl"

    unk_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        """The tokenizer: it knows all words but one."""
        return {"input_ids": [int(text != "zebra")]}

    def attach(self, model: Any, processor: Any, source: str | None = None, **how: Any) -> Any:
        self.calls["attach"] = (source, how)
        return SimpleNamespace(backbone=SimpleNamespace(processor=processor), trace=Trace())

    def train(self, memory: Any, samples: Any, heldout: Any, config: Any, output: Path, **how: Any) -> dict[str, Any]:
        self.calls["train"] = (len(samples), config, output, how)
        if self.error:
            raise self.error
        scores = {"right": 0.5, "below": 0.25}
        skipped = [asdict(own) for own in samples.skipped]
        tables = {"heldout": {"base": {"right": 0.0}, "memory": scores}}
        counts = {"questions": {"right": 4, "below": 2}, "not_blind": {"below": 1}}
        return {**tables, **counts, "invocations_per_answer": 1.0, "seconds": 2.0, "skipped": skipped}

    def answers(self, memory: Any, samples: Any, **how: Any) -> Iterator[Any]:
        self.calls["answers"] = how
        for sample in samples:
            self.answered.append(sample.id)
            content = {"text": "a bag", "invocations": [{"kind": "short", "position": 0}]}
            invocation = SimpleNamespace(kind="short", position=0)
            yield SimpleNamespace(
                sample_id=sample.id,
                text="a bag",
                marked="‹short› a bag",
                invocations=[invocation],
                to_dict=lambda content=content: content,
            )


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Core:
    core = Core()
    (tmp_path / "memory.safetensors").write_bytes(b"")
    about = {"format": 1, "weights": EMPTY, "memory": {"trigger": "policy"}, "base": {"backbone": "qwen2_5_vl"}}
    (tmp_path / "vismem.json").write_text(json.dumps(about))
    fakes = {
        "base.loading": {"load_base": core.load_base},
        "answers.checking": {"checked": lambda backbone, data, on_bad, **how: data},
        "answers.inference": {"answers": core.answers, "Answer": SimpleNamespace},
        "training.run": {"train": core.train},
        "answers.evaluation": {
            "right": lambda text, sample: text == sample.answer,
            "evaluate": lambda memory, samples, **how: core.train(memory, samples, samples, how, tmp_path),
        },
    }
    monkeypatch.setattr("vismem_core.attach", core.attach, raising=False)  # finds the real one, so before the others
    for name, attributes in fakes.items():
        module = ModuleType(f"vismem_core.{name}")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, f"vismem_core.{name}", module)
    base = plugins.registry("bases").get("qwen2_5_vl")()
    shipped = lambda backbone=None: (backbone or "qwen2_5_vl", type(base)(**(vars(base) | {"memory": tmp_path})))  # noqa: E731
    monkeypatch.setattr("vismem_cli.sources.embedded", shipped)
    monkeypatch.setattr("vismem_core.files.checkpoint.embedded", shipped)
    return core


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"id": name, "prompt": "hm ?", "answer": "yes"} for name in "abc"]
    path.write_text("\n".join(map(json.dumps, rows)) + "\nbroken\n")
    return path


def test_train_passes_everything_on(vismem: Callable[..., Run], core: Core, questions: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("train: {seed: 1, save_every: 7}\nmemory: {budget: 3}\n")
    args = ["--config", config, "--set", "train.seed=2", "--seed", 3, "--stage", "formation", "--resume"]
    args += ["--policy", "lora", "--image-dropout", 0.5]
    done = vismem("train", "--data", questions, "--on-bad-sample", "skip", "--json", "--dtype", "float32", *args)
    assert done.code == 0, done.err
    count, run, output, how = core.calls["train"]
    assert (count, output, how) == (
        3,
        Path("runs/qwen2_5_vl"),
        {"resume": True, "groups": None} | {"on_bad": "skip", "check": "all"},
    )
    assert (run.train.seed, run.train.save_every, run.train.stage, run.memory.budget) == (3, 7, "formation", 3)
    assert (run.train.image_dropout, run.memory.policy.trains) == (0.5, "lora")
    how = {"config": run.memory, "backbone": "qwen2_5_vl", "seed": 3, "any_base": False}
    assert core.calls["attach"] == (None, how)
    assert core.calls["load_base"][2]["dtype"] == "float32"
    assert core.calls["load_base"][2]["trust_remote_code"] is False
    assert done.json["heldout"]["memory"] == {"right": 0.5, "below": 0.25}
    assert [(row["file"], row["line"]) for row in done.json["skipped"]] == [(str(questions), 4)]
    assert f"  {questions}:4: not JSON" in done.err
    assert "the report will be on the training data" in done.err


def test_training_goes_on_from_a_trained_memory_on_its_own_model(
    vismem: Callable[..., Run], core: Core, tmp_path: Path
) -> None:
    about = json.loads((tmp_path / "vismem.json").read_text())
    about |= {"base": {"backbone": "llava", "name": "some/model"}, "memory": {"budget": 3, "long": {"length": 4}}}
    (tmp_path / "vismem.json").write_text(json.dumps(about))
    args = ["--memory", tmp_path, "--data", "mosaic", "--set", "memory.budget=2", "--any-base"]
    done = vismem("train", *args)
    assert done.code == 0, done.err
    _, run, _, _ = core.calls["train"]
    assert (run.memory.budget, run.memory.long.length, run.train.memory) == (2, 4, str(tmp_path))
    assert core.calls["load_base"][:2] == ("llava", "some/model")
    assert core.calls["attach"][0] == str(tmp_path) and core.calls["attach"][1]["any_base"]
    assert vismem("train", "--memory", tmp_path / "lost").err == f"error: {tmp_path / 'lost'}: no such folder\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--set", "memory.short.name=lara"], "unknown former 'lara'; did you mean 'lora'?"),
        (["train", "--set", "memory.long.name=lara"], "unknown former 'lara'; did you mean 'lora'?"),
        (["train", "--set", "memory.query.builder=crosss"], "unknown query builder 'crosss'; did you mean 'cross'?"),
        (["train", "--set", "memory.trigger=polcy"], "unknown trigger 'polcy'; did you mean 'policy'?"),
        (["train", "--set", "train.grpo.rewards=[exakt]"], "unknown reward 'exakt'; did you mean 'exact'?"),
        (["train", "--metric", "exakt"], "unknown metric 'exakt'; did you mean 'exact'?"),
        (["eval", "--metric", "vqa:3"], "metric vqa takes no argument"),
        (["probe", "--metric", "anlz"], "unknown metric 'anlz'; did you mean 'anls'?"),
        (["train", "--set", "train.callbacks=[cal:x]"], "unknown callback 'cal'; did you mean 'call'?"),
        (
            ["train", "--model", "x/y", "--data", "mosaic", "--backbone", "lava"],
            "unknown backbone 'lava'; did you mean",
        ),
        (["eval", "--model", "x/y", "--data", "mosaic", "--backbone", "lava"], "unknown backbone 'lava'; did you mean"),
        (["infer", "--model", "x/y", "--prompt", "?", "--backbone", "lava"], "unknown backbone 'lava'; did you mean"),
        (["infer", "--trigger", "randon:0.5"], "unknown trigger 'randon'; did you mean 'random'?"),
        (["infer", "--trigger", "random:often"], "trigger random takes a probability"),
    ],
)
def test_misspelt_names_are_told_before_a_model_loads(
    vismem: Callable[..., Run], core: Core, args: list[str], message: str
) -> None:
    done = vismem(*args)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ") and message in done.err
    assert core.calls == {}


def test_answers_are_judged_by_the_metric_that_is_named(vismem: Callable[..., Run], core: Core) -> None:
    assert vismem("train", "--metric", "vqa").code == 0 and core.calls["train"][1].train.metric == "vqa"
    assert vismem("eval", "--metric", "anls").code == 0 and core.calls["train"][1]["metric"] == "anls"


def test_training_data_are_not_held_out(vismem: Callable[..., Run], core: Core, questions: Path) -> None:
    args = ["--data", questions, "--on-bad-sample", "skip", "--set", "train.evaluation.every=5"]
    done = vismem("train", *args)
    told = f"error: train.evaluation.every needs data that is held out of {questions}: name it with --heldout\n"
    assert done.code == 1 and done.err.endswith(told) and core.calls == {}
    other = questions.with_name("others.jsonl")
    other.write_bytes(questions.read_bytes())
    assert vismem("train", *args, "--heldout", other).code == 0


def test_a_model_of_ones_own_is_not_given_the_shipped_memory(
    vismem: Callable[..., Run], core: Core, questions: Path
) -> None:
    args = ["--data", questions, "--on-bad-sample", "skip", "--output", questions.with_name("answers")]
    done = vismem("infer", "--model", "some/model", *args)
    expected = "error: no trained memory is named for some/model; train one (vismem train --model), then --memory DIR\n"
    assert (done.code, done.err, core.calls) == (1, expected, {})


def test_words_without_a_token_are_told(vismem: Callable[..., Run], core: Core, questions: Path) -> None:
    done = vismem("infer", "--prompt", "is it a zebra ?")
    told = "warning: this model has no token for 1 of the 5 words it is given: 'zebra'\n"
    assert done.code == 0
    assert told in done.err
    assert told not in vismem("infer", "--prompt", "is it a bag ?").err
    questions.write_text('{"id": "a", "prompt": "what ?", "answer": "zebra"}\n')
    done = vismem("train", "--data", questions)
    assert "no token for 1 of the 3 words" in done.err
    assert "Training questions" in done.out


def test_a_run_goes_on_by_its_settings(vismem: Callable[..., Run], core: Core, tmp_path: Path) -> None:
    before = Config(train=TrainConfig(seed=5, save_every=3), memory=MemoryConfig(budget=3))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(before)))
    assert vismem("train", "--output", tmp_path, "--resume").code == 0
    assert core.calls["train"][1] == before
    assert vismem("train", "--output", tmp_path, "--resume", "--seed", "6").code == 0
    assert core.calls["train"][1].train.seed == 6  # which the run itself refuses


def test_a_run_that_is_not_there_is_not_resumed(vismem: Callable[..., Run], core: Core, tmp_path: Path) -> None:
    done = vismem("train", "--resume", "--output", tmp_path / "rnus")
    assert (done.code, core.calls) == (1, {})
    assert done.err == f"error: {tmp_path / 'rnus'}: there is no run to resume; without --resume one begins\n"
    assert vismem("train", "--resume", "--output", tmp_path / "new", "--data", "mosaic").code == 0  # as a queue does


def test_questions_that_memory_was_trained_on_are_told(
    vismem: Callable[..., Run], core: Core, questions: Path, tmp_path: Path
) -> None:
    questions.write_text('{"id": "a", "prompt": "hm ?", "answer": "yes"}\n')
    told = {"source": str(questions), "samples": 1, "digest": read(questions, need_answer=True).told}
    run = {"base": {}, "data": told, "heldout": told, "processes": 1, "rows": {}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    done = vismem("eval", "--memory", tmp_path, "--data", questions)
    assert "this memory was trained on these questions" in done.err and "Training questions" in done.out
    questions.write_text('{"id": "a", "prompt": "hm ?", "answer": "no"}\n')
    assert "trained on" not in vismem("eval", "--memory", tmp_path, "--data", questions).err


def test_memory_that_holds_nothing_is_told(vismem: Callable[..., Run], core: Core) -> None:
    assert "holds nothing yet" in vismem("train", "--stage", "invocation").err
    assert "holds nothing yet" not in vismem("train", "--stage", "formation").err


def test_a_run_is_not_overwritten_and_no_model_loaded_to_tell(
    vismem: Callable[..., Run], core: Core, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    message = f"error: {tmp_path}: holds a run; --resume it, or choose another --output\n"
    assert (vismem("train", "--output", tmp_path).err, core.calls) == (message, {})
    (tmp_path / "config.json").rename(tmp_path / "mine.json")
    message = f"error: {tmp_path}: not empty, and no run of vismem; choose another --output\n"
    assert (vismem("train", "--output", tmp_path).err, core.calls) == (message, {})
    assert vismem("train", "--output", tmp_path / "other").code == 0
    assert "load_base" in core.calls


@pytest.mark.parametrize("command", ["train", "eval"])
def test_reports_are_tables(vismem: Callable[..., Run], core: Core, command: str) -> None:
    done = vismem(command)
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines()]
    assert rows[1:] == [
        ["accuracy", "n", "base", "memory"],
        ["right", "4", "0.000", "0.500"],
        ["below", "2", "0.250"],
        ["mean", "0.000", "0.375"],
    ]
    assert "blind columns leave out questions that no sample has other images for: 1 of 2 'below'" in done.err
    assert "1.00 invocations per answer" in done.err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (TrainingError("runs/x holds\nanother run"), 1, "error: runs/x holds another run\n"),
        (
            OSError(28, "No space left on device", "runs/x"),
            1,
            "error: runs/x: No space left on device; free some space",
        ),
        (OSError("no such model\non the hub"), 1, "error: no such model on the hub\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_while_training(
    vismem: Callable[..., Run], core: Core, error: BaseException, code: int, message: str
) -> None:
    core.error = error
    done = vismem("train")
    assert (done.code, done.out) == (code, "")
    assert message in done.err


def test_infer_without_arguments(vismem: Callable[..., Run], core: Core) -> None:
    done = vismem("infer")
    assert done.out == "‹short› a bag\n"
    assert "what is right of" in done.err
    assert "1 short" in done.err and "right   no: the reference is 'dress'\n" in done.err
    written = {"text": "a bag", "invocations": [{"kind": "short", "position": 0}]}
    assert vismem("infer", "--json").json == written | {"reference": "dress", "right": False}
    asked = vismem("infer", "--prompt", "what ?", "--json")
    assert asked.json == written and "reference" not in asked.err


def test_infer_goes_on_with_a_file(vismem: Callable[..., Run], core: Core, questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    made = {"memory": EMPTY, "model": None, "trigger": "random:0.5", "max_new_tokens": 256}
    asked = hashlib.sha256(b"hm ?").hexdigest()[:16]
    output.write_text(json.dumps({"id": "b", "text": "kept", "question": asked, "made": made}) + '\n{"id": "c", "te')
    args = ["infer", "--data", questions, "--output", output, "--on-bad-sample", "skip", "--trigger", "random:0.5"]
    done = vismem(*args, "--batch", 2, "--json")
    assert done.code == 0, done.err
    assert core.answered == ["a", "c"]
    assert core.calls["answers"] == {"trigger": "random:0.5", "max_new_tokens": 256, "batch": 2, "left_out": ANY}
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == ["b", "a", "c"]
    assert (done.json["answered"], done.json["kept"], len(done.json["skipped"])) == (2, 1, 1)
    assert (done.json["right"], done.json["with_reference"]) == (0, 2)
    assert json.loads(output.read_text().splitlines()[-1])["reference"] == "yes"
    core.calls.clear()
    assert vismem(*args).code == 0
    assert core.calls == {}  # nothing left: not even the model is loaded
    done = vismem(*args[:-1], "never")
    assert (done.code, core.calls) == (1, {})
    assert "answers.jsonl:1: answered with trigger 'random:0.5', not 'never'" in done.err


def test_demo_shows_a_memory_until_it_is_interrupted(
    vismem: Callable[..., Run], core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vismem_cli.demo.Event", lambda: SimpleNamespace(wait=interrupted))
    monkeypatch.setattr(vismem_core.showing.page, "check", lambda *place: core.calls.update(check=place))
    monkeypatch.setattr(vismem_core.showing.page, "show", lambda memory, *place: core.calls.update(show=place))
    done = vismem("demo", "--memory", "shipped:qwen2_5_vl", "--host", "0.0.0.0", "--port", 8000)
    assert (done.code, core.calls["attach"][0]) == (130, "shipped:qwen2_5_vl")
    assert core.calls["check"] == core.calls["show"] == ("0.0.0.0", 8000)
    assert "whoever reaches 0.0.0.0:8000" in done.err and "open http://0.0.0.0:8000/" in done.err


def test_demo_says_what_is_missing_before_a_model_loads(
    vismem: Callable[..., Run], core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = vismem("demo")
    assert (done.code, done.err, core.calls) == (1, "error: the page needs gradio: pip install 'vismem[demo]'\n", {})


@pytest.mark.parametrize("name", ["missing/answer.png", "answer.nonsense", "answer"])
def test_a_picture_that_cannot_be_written_is_told_first(
    vismem: Callable[..., Run], core: Core, tmp_path: Path, name: str
) -> None:
    done = vismem("infer", "--picture", tmp_path / name)
    assert (done.code, done.out, core.calls) == (1, "", {})
    assert done.err.startswith(f"error: {tmp_path / name}: ") and done.err.count("\n") == 1
