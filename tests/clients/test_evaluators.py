"""What other programs' evaluations ask of a model with memory: requests of lmms-eval, and the class of the guide.

Neither program is here: small stand-ins take the place of their base classes, with the same names and signatures.
``tests/clients/by_hand/lmms_eval_mosaic.py`` compares with the real lmms-eval.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import vismem_core as vismem
from vismem_core.answers.inference import Answer, answers
from vismem_core.errors import DataError, VismemError
from vismem_core.files.samples import Sample
from vismem_plugins.lmms_eval.requests import generation, of_context, of_messages
from vismem_plugins.mini import path
from vismem_plugins.mosaic import mosaic

MEMORY = path("qwen2_5_vl") / "memory"
SAMPLES = mosaic("heldout", types=["most", "right"])[:3]
DOCS = [{"image": own.load_images()[0], "prompt": own.prompt} for own in SAMPLES]
PICTURE = Image.new("RGB", (28, 28))


# Requests


def test_images_stand_in_front_or_where_the_task_has_them() -> None:
    assert of_context("t/1", "what ?", None) == Sample("t/1", (), "what ?")
    assert of_context("t/1", "what ?", [PICTURE, "b.png"]).images == (PICTURE, Path("b.png"))
    image, text = {"type": "image", "url": PICTURE}, {"type": "text", "text": "what ?"}
    system = {"role": "system", "content": "be brief"}
    told = of_messages("t/1", [system, {"role": "user", "content": [image, image, text]}])
    assert (told.prompt, told.images, told.turns) == ("what ?", (PICTURE, PICTURE), (("system", "be brief"),))
    told = of_messages("t/1", [{"role": "user", "content": [image, text, image]}])
    assert told.prompt == "<image>what ?<image>"
    told = of_messages("t/1", [{"role": "user", "content": [image, {"type": "text", "text": "is <image> red ?"}]}])
    assert (told.prompt, len(told.images)) == ("is <image> red ?", 1)
    before = [{"role": "user", "content": [text]}, {"role": "assistant", "content": [text]}]
    told = of_messages("t/1", [*before, {"role": "user", "content": [image, text]}])
    assert (told.turns, told.prompt) == ((("user", "what ?"), ("assistant", "what ?")), "<image>what ?")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "t/1: video 'a.mp4' is no image"),
        ([{"role": "user", "content": "?"}, {"role": "assistant", "content": "I"}], "t/1: its messages do not end"),
        ([], "t/1: its messages do not end"),
    ],
)
def test_what_is_no_question_about_images_is_refused_by_name(messages: list[Any], said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        of_messages("t/1", messages)
    with pytest.raises(DataError, match=re.escape("t/1: str 'a.mp4' is no image")):
        of_context("t/1", "what ?", ["a.mp4"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"until": ["\n\n"]}, {"max_new_tokens": 9, "stop": [], "do_sample": False}),
        ({"until": "END", "max_new_tokens": 3}, {"max_new_tokens": 3, "stop": ["END"], "do_sample": False}),
        ({"temperature": 0, "do_sample": True, "top_p": 0.5}, {"do_sample": False}),
        ({"temperature": 0.5, "top_p": 0.5}, {"do_sample": True, "temperature": 0.5, "top_p": 0.5}),
        ({"temperature": 0.5, "do_sample": False, "num_beams": 1}, {"do_sample": False, "num_beams": 1}),
        ({"do_sample": True, "top_k": None}, {"do_sample": True}),
    ],
)
def test_settings_of_generation(settings: dict[str, Any], told: dict[str, Any]) -> None:
    assert generation(settings, 9) == ({"max_new_tokens": 9, "stop": []} | told, set())
    assert generation(settings | {"image_aspect_ratio": "pad"}, 9)[1] == {"image_aspect_ratio"}


# lmms-eval


class Base:
    """lmms-eval's base class, as far as a model relies on it."""

    def __init__(self) -> None:
        self._rank, self.task_dict = 0, dict[str, Any]()

    @property
    def rank(self) -> int:
        return self._rank


@dataclass
class Counts:
    output_tokens: int | None = None

    def to_dict(self) -> dict[str, int | None]:
        return {"output_tokens": self.output_tokens}


@dataclass
class Result:
    text: Any
    token_counts: Any = None


@dataclass
class Manifest:
    model_id: str
    simple_class_path: str
    chat_class_path: str


@pytest.fixture(scope="module")
def told() -> Iterator[list[str]]:
    """lmms-eval and its logger, stood in for; what was logged."""
    lines: list[str] = []
    logger = SimpleNamespace(info=lines.append, warning=lines.append)
    parts = {
        "lmms_eval.api.instance": {"GenerationResult": Result, "Instance": object, "TokenCounts": Counts},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
        "lmms_eval.utils": {
            "simple_parse_args_string": lambda told: dict(own.split("=", 1) for own in told.split(","))
        },
        "loguru": {"logger": logger},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models", *parts):
            module = ModuleType(name)
            vars(module).update(parts.get(name, {}))
            patch.setitem(sys.modules, name, module)
        yield lines
        sys.modules.pop("vismem_plugins.lmms_eval.model", None)


@dataclass
class Request:
    """One of a task's requests, as lmms-eval makes them."""

    args: tuple[Any, ...]
    doc_id: int
    task_name: str = "t"
    metadata: dict[str, Any] = field(default_factory=dict)


def requests(kind: str, count: int = len(DOCS), settings: dict[str, Any] | None = None) -> list[Request]:
    settings = {"max_new_tokens": 8, "until": ["\n\n"]} if settings is None else settings
    made = []
    for at in range(count):
        if kind == "simple":
            args: tuple[Any, ...] = (DOCS[at]["prompt"], settings, lambda doc: [doc["image"]])
        else:
            args = (DOCS[at]["prompt"], messages, settings)
        made.append(Request((*args, at, "t", "test"), at))
    return made


def messages(
    doc: dict[str, Any], round_idx: int = 0, previous_output: Any = (), previous_round_info: Any = None
) -> Any:
    """A task's: a question, and in rounds of it a second one about the answer."""
    parts = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["prompt"]}]
    asked = [{"role": "user", "content": parts}]
    if not round_idx:
        return asked
    parts[1]["text"] = f"is it a {previous_output[-1]} ?"
    return asked, round_idx == 2, previous_output, previous_round_info


@pytest.fixture(scope="module")
def models(told: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model of each kind, as the command line makes them, on one base."""
    module = import_module("vismem_plugins.lmms_eval.model")
    log = tmp_path_factory.mktemp("logs") / "log.jsonl"
    chat = module.Chat.create_from_arg_string(f"memory={MEMORY},batch_size=2,log={log},device=cpu", {"batch_size": 1})
    chat.task_dict = {"t": {"test": DOCS}}
    simple = module.Simple.__new__(module.Simple)
    vars(simple).update(vars(chat))
    return {"chat": chat, "simple": simple}


def expected(models: dict[str, Any], samples: list[Sample]) -> list[Answer]:
    return list(answers(models["chat"].memory, samples, max_new_tokens=8))


@pytest.mark.parametrize("kind", ["chat", "simple"])
def test_answers_and_their_logs_are_vismems(models: dict[str, Any], told: list[str], kind: str) -> None:
    model, own = models[kind], expected(models, SAMPLES)
    assert model.batch_size == 2 and model.is_simple == (kind == "simple")
    model.log.unlink(missing_ok=True)
    found = model.generate_until(requests(kind))
    assert [result.text for result in found] == [answer.text for answer in own]
    rows = [json.loads(line) for line in model.log.read_text(encoding="utf-8").splitlines()]
    assert [(row["task"], row["doc_id"], row["text"]) for row in rows] == [
        ("t", at, a.text) for at, a in enumerate(own)
    ]
    assert [row["invocations"] for row in rows] == [json.loads(json.dumps(a.to_dict()))["invocations"] for a in own]
    counts = [result.token_counts.to_dict() for result in found]
    assert [own["short"] + own["long"] for own in counts] == [len(answer.invocations) for answer in own]
    assert sum(own["short"] + own["long"] for own in counts) > 0
    short, long = (sum(own[kind] for own in counts) / 3 for kind in ("short", "long"))
    assert told[-1] == f"vismem: 3 answers, invocations per answer: {short:.2f} short, {long:.2f} long"


def test_requests_with_other_settings_are_other_batches_in_order(models: dict[str, Any], told: list[str]) -> None:
    mixed = requests("chat")
    mixed[1] = requests("chat", settings={"max_new_tokens": 8, "until": ["o"], "image_aspect_ratio": "pad"})[1]
    own = [answer.text for answer in expected(models, SAMPLES)]
    found = [result.text for result in models["chat"].generate_until(mixed)]
    assert found == [own[0], own[1].partition("o")[0], own[2]]
    assert any("image_aspect_ratio" in line for line in told)


@pytest.mark.long
def test_rounds_ask_on(models: dict[str, Any]) -> None:
    first = expected(models, SAMPLES)
    further = [replace(own, prompt=f"is it a {a.text} ?") for own, a in zip(SAMPLES, first, strict=True)]
    pairs = zip(first, expected(models, further), strict=True)
    assert models["chat"].generate_until_multi_round(requests("chat")) == [[a.text, b.text] for a, b in pairs]


def test_continuations_are_losses(models: dict[str, Any]) -> None:
    answer = expected(models, SAMPLES[:1])[0]
    asked = requests("simple", 1) * 2
    texts = (f" {answer.text}", lambda doc: "row 2 column 2")
    asked = [Request((own.args[0], text, *own.args[2:]), 0) for own, text in zip(asked, texts, strict=True)]
    bare = Request(("", f" {answer.text}"), 0)
    (right, greedy), (wrong, not_greedy), (loss, _) = [
        own.text for own in models["simple"].loglikelihood([*asked, bare])
    ]
    assert 0 < right < wrong and loss > 0 and (greedy, not_greedy) == (True, False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "which memory?"),
        ({"memory": MEMORY, "batch_size": "auto"}, "batch_size=auto"),
        ({"memory": MEMORY, "log": MEMORY / "vismem.json"}, "exists already"),
        ({"memory": MEMORY / "none"}, "none"),
    ],
)
def test_what_is_missing_is_said(told: list[str], arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(VismemError, match=re.escape(said)):
        import_module("vismem_plugins.lmms_eval.model").Chat(**arguments)


def test_the_entry_point_names_both_models(told: list[str]) -> None:
    manifest = import_module("vismem_plugins.lmms_eval").manifest()
    assert manifest.model_id == "vismem"
    for path_, simple in ((manifest.simple_class_path, True), (manifest.chat_class_path, False)):
        module, _, name = path_.rpartition(".")
        assert getattr(import_module(module), name).is_simple == simple
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."lmms_eval.models"]\nvismem = "vismem_plugins.lmms_eval:manifest"' in project


# VLMEvalKit


@pytest.mark.long
def test_the_guides_class_answers_as_vismem_does(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known: dict[str, Any] = {}
    parts = {"vlmeval.config": {"supported_VLM": known}, "vlmeval.vlm.base": {"BaseModel": object}}
    for name in ("vlmeval", "vlmeval.vlm", *parts):
        module = ModuleType(name)
        vars(module).update(parts.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    guide = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    place: dict[str, Any] = {"__name__": "run_vismem"}
    exec(compile(block, "evaluation.md", "exec"), place)
    assert set(known) == {"vismem", "vismem-off"} and known["vismem-off"].keywords["trigger"] == "never"
    model = place["VisMem"](str(MEMORY), backbone="qwen2_5_vl", max_new_tokens=8)
    for own, answer in zip(SAMPLES, expected(models, SAMPLES), strict=True):
        own.load_images()[0].save(tmp_path / "own.png")
        message = [{"type": "image", "value": str(tmp_path / "own.png")}, {"type": "text", "value": own.prompt}]
        assert model.generate_inner(message, "any") == answer.text
        assert model.invocations[-1] == [(place.kind, place.position) for place in answer.invocations]
    assert isinstance(model.memory, vismem.Memory)
