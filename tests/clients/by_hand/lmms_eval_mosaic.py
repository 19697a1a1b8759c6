"""lmms-eval 0.7.3 on models with memory: the same answers, invocations and likelihoods as vismem's own.

    pip install vismem lmms-eval==0.7.3 "filelock<3.20"
    python tests/clients/by_hand/lmms_eval_mosaic.py

Prints a line for each comparison and ends with 1 if one of them fails. It is no part of the test suite: lmms-eval takes
minutes to install, and other versions of packages than vismem's own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

import vismem_core as vismem
from vismem_core.answers.inference import Answer, answers
from vismem_core.base.loading import load_base
from vismem_core.files.samples import Sample, open_dataset
from vismem_plugins.mini import path

EXAMPLES = Path(__file__).parents[3] / "examples"
HEAD = """
dataset_path: json
dataset_kwargs: {data_files: {test: data/heldout.json}}
test_split: test
doc_to_target: !function utils.target
metric_list: [{metric: METRIC, aggregation: mean, higher_is_better: true}]
"""
GENERATES = "generation_kwargs: {max_new_tokens: 16}\nprocess_results: !function more.exact\n"
SEES = "doc_to_visual: !function utils.visual\ndoc_to_text: !function utils.text\n"
TASKS = {
    "choices": f"{SEES}output_type: multiple_choice\ndoc_to_choice: !function more.choices\n",
    "rounds": f"output_type: generate_until_multi_round\ndoc_to_visual: !function utils.visual\n{GENERATES}"
    "doc_to_text: !function more.rounds\n",
    "talks": f"output_type: generate_until\ndoc_to_messages: !function more.messages\n{SEES}{GENERATES}",
    "films": f"output_type: generate_until\ndoc_to_visual: !function more.film\ndoc_to_text: !function utils.text\n"
    f"{GENERATES}",
}
MORE = """
BEFORE = [("user", "what is the opposite of above ?"), ("assistant", "below")]

def exact(doc, found):
    return {"exact": float(str(found[0]).strip() == target(doc))}

def rounds(doc, lmms_eval_specific_kwargs=None, round_idx=None, previous_output=None, previous_round_info=None):
    if round_idx is None:
        return text(doc)
    return visual(doc), f"is it a {previous_output[-1]} ?", round_idx == 2, previous_output, None

def messages(doc):
    told = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in BEFORE]
    asked = [{"type": "image", "url": own} for own in visual(doc)] + [{"type": "text", "text": text(doc)}]
    return [*told, {"role": "user", "content": asked}]

def choices(doc):
    others = ["boot", "top", "coat", "no", "row 2 column 2"]
    return [target(doc), *(own for own in others if own != target(doc))][:5]

def film(doc):
    return ["film.mp4"]
"""
OTHERS = ["boot", "top", "coat", "no", "row 2 column 2"]
BEFORE = (("user", "what is the opposite of above ?"), ("assistant", "below"))
FAILED: list[str] = []


def check(name: str, told: object, expected: object) -> None:
    """Print whether two things are equal, and remember if not."""
    equal = told == expected
    print("equal  " if equal else "DIFFERS", name)
    if not equal:
        print(f"        lmms-eval {told}\n        vismem    {expected}")
        FAILED.append(name)


def near(name: str, told: list[float], expected: list[float]) -> None:
    """The same for numbers; they come from passes of other shapes."""
    far = max(abs(a - b) for a, b in zip(told, expected, strict=True))
    check(f"{name}, to {far:.1e}", far < 1e-3, True)


def tasks(folder: Path) -> None:
    """The data and the task of the guide, and beside them tasks that ask in other ways."""
    run = [sys.executable, str(EXAMPLES / "llava_mosaics.py"), "--rows", "1", "--heldout", "10", "--output", "data"]
    subprocess.run(run, cwd=folder, check=True)
    shutil.copytree(EXAMPLES / "lmms_eval", folder / "tasks")
    own = (folder / "tasks" / "utils.py").read_text(encoding="utf-8")
    (folder / "tasks" / "more.py").write_text(own + MORE, encoding="utf-8")
    for name, text in TASKS.items():
        metric = "acc" if name == "choices" else "exact"
        told = f"task: {name}\n{HEAD.replace('METRIC', metric)}{text}"
        (folder / "tasks" / f"{name}.yaml").write_text(told, encoding="utf-8")


def asked(manager: TaskManager, task: str, name: str, batch: int, simple: bool = False, **more: Any) -> Any:
    """What lmms-eval logs of a task: its samples, and our rows beside them."""
    log = Path(tempfile.mkdtemp()) / "log.jsonl"
    told = {
        "memory": path(name) / "memory",
        "batch_size": batch,
        "log": log,
        "dtype": "float32",
        "device": "cpu",
    } | more
    found = simple_evaluate(
        model="vismem",
        model_args=",".join(f"{key}={value}" for key, value in told.items()),
        tasks=[task],
        task_manager=manager,
        log_samples=True,
        force_simple=simple,
    )
    return found["samples"][task], [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def places(answer: Answer) -> list[dict[str, Any]]:
    return [{"kind": own.kind, "position": own.position} for own in answer.invocations]


def counted(answer: Answer) -> dict[str, int]:
    kinds = [own.kind for own in answer.invocations]
    return {"output_tokens": answer.tokens, "short": kinds.count("short"), "long": kinds.count("long")}


def likelihood(memory: vismem.Memory, sample: Sample, row: dict[str, Any], off: bool) -> float:
    """Of an answer, by one pass over prompt and answer with the memory tokens where they were written."""
    tokenizer, tokens = memory.backbone.processor.tokenizer, memory.tokens
    words = tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
    ids = list(words)
    for own in row["invocations"]:
        kind = own["kind"]
        ids[own["position"] : own["position"]] = [tokens.invocation(kind), tokens.end(kind)]
    inputs = memory.backbone.inputs([sample.prompt], [sample.load_images()])
    start, extra = inputs["input_ids"].shape[1], torch.tensor([ids])
    whole = {"input_ids": extra, "attention_mask": torch.ones_like(extra), "mm_token_type_ids": torch.zeros_like(extra)}
    for name, own in whole.items():
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], own], dim=1)
    with torch.no_grad(), memory.off() if off else memory.triggered(memory.trigger):
        logits = memory.model(**inputs).logits[0, start - 1 : -1, : tokens.first].log_softmax(-1)
    return sum(float(logits[at, own]) for at, own in enumerate(ids) if own < tokens.first)


def family(manager: TaskManager, name: str) -> None:
    """All of one backbone: its mini with the memory that ships with it."""
    model, processor, backbone = load_base(name, device="cpu")
    memory = vismem.attach(model, processor, path(name) / "memory", backbone=backbone)
    samples = list(open_dataset("data/heldout.json", "heldout"))
    plain = [replace(own, prompt=own.prompt.removeprefix("<image>\n")) for own in samples]
    expected = list(answers(memory, samples, max_new_tokens=16, batch=10))
    print(f"{name}: {[own.marked for own in expected]}")
    for batch, simple in ((1, False), (4, False), (4, True)):
        told, log = asked(manager, "mosaics", name, batch, simple)
        title = f"{name} {'contexts' if simple else 'messages'} batch {batch}"
        check(f"{title}: texts", [own["filtered_resps"][0] for own in told], [own.text for own in expected])
        check(f"{title}: invocations in the log", [own["invocations"] for own in log], list(map(places, expected)))
        counts = [own["token_counts"][0] for own in told]
        check(f"{title}: invocations beside samples", counts, list(map(counted, expected)))
    check(f"{name}: memory is invoked", any(own.invocations for own in expected), True)
    others(manager, name, memory, plain)
    for trigger in ("policy", "never"):
        told, log = asked(manager, "choices", name, 4, True, trigger=trigger)
        offered = [[own.answer, *(text for text in OTHERS if text != own.answer)][:5] for own in plain]
        choices = [replace(own, answer=text) for own, texts in zip(plain, offered, strict=True) for text in texts]
        losses = [pair[0] for own in told for pair in own["filtered_resps"]]
        rows = zip(choices, log, strict=True)
        expected_losses = [-likelihood(memory, *own, trigger == "never") for own in rows]
        near(f"{name} {trigger}: losses", losses, expected_losses)
        best = [min(range(5), key=expected_losses[at : at + 5].__getitem__) for at in range(0, len(losses), 5)]
        check(f"{name} {trigger}: accuracy", [own["acc"] for own in told], [float(own == 0) for own in best])
        greedy = {own.sample_id: own.text for own in answers(memory, plain, max_new_tokens=16, trigger=trigger)}
        starts = [greedy[own.id].split()[: len(str(own.answer).split())] == str(own.answer).split() for own in choices]
        check(f"{name} {trigger}: greedy", [pair[1] for own in told for pair in own["filtered_resps"]], starts)
        print(f"        {sum(len(own['invocations']) for own in log)} invocations in {len(log)} continuations")


def others(manager: TaskManager, name: str, memory: vismem.Memory, samples: list[Sample]) -> None:
    """Conversations, rounds, and what is refused."""
    talks = [replace(own, prompt=f"<image>{own.prompt}", turns=BEFORE) for own in samples]
    expected = [own.text for own in answers(memory, talks, max_new_tokens=16)]
    check(f"{name}: talks", [own["filtered_resps"][0] for own in asked(manager, "talks", name, 4)[0]], expected)
    first = [own.text for own in answers(memory, samples, max_new_tokens=16)]
    further = [replace(own, prompt=f"is it a {text} ?") for own, text in zip(samples, first, strict=True)]
    second = [own.text for own in answers(memory, further, max_new_tokens=16)]
    for simple in (False, True):
        told = [own["filtered_resps"][0] for own in asked(manager, "rounds", name, 4, simple)[0]]
        check(f"{name}: rounds", [list(own) for own in told], [list(own) for own in zip(first, second, strict=True)])
    try:
        asked(manager, "films", name, 4)
    except vismem.VismemError as error:
        check(f"{name}: a film is refused: {error}", "film.mp4" in str(error), True)
    else:
        check(f"{name}: a film is refused", "answered", "refused")


def command(name: str, launcher: list[str], title: str) -> None:
    """The command line, in one process or several."""
    memory, log, out = path(name) / "memory", Path(f"{title}.jsonl"), Path(title)
    words = [
        "--model",
        "vismem",
        "--model_args",
        f"memory={memory},log={log}",
        "--tasks",
        "mosaics",
        "--batch_size",
        "4",
    ]
    words += ["--include_path", "tasks", "--output_path", str(out), "--log_samples"]
    ran = subprocess.run([*launcher, *words], capture_output=True, text=True, check=False)
    if ran.returncode:
        check(f"{title}: the command ends well", ran.stderr[-2000:] + ran.stdout[-2000:], "")
        return
    print(next(line for line in ran.stdout.splitlines() if "invocations per answer" in line).rpartition(" - ")[2])
    found = next(out.rglob("*samples_mosaics.jsonl")).read_text(encoding="utf-8").splitlines()
    told = {own["doc_id"]: own["filtered_resps"] for own in map(json.loads, found)}
    model, processor, backbone = load_base(name, device="cpu")
    memory_on = vismem.attach(model, processor, memory, backbone=backbone)
    expected = answers(memory_on, open_dataset("data/heldout.json", "heldout"), max_new_tokens=16)
    check(f"{title}: texts", told, dict(enumerate(own.text for own in expected)))
    check(f"{title}: rows of logs", sum(1 for _ in logged(log)), len(told))


def logged(log: Path) -> Iterator[str]:
    for own in log.parent.glob(f"{log.name}*"):
        yield from own.read_text(encoding="utf-8").splitlines()


def main() -> None:
    """All comparisons."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HF_HOME"] = temporary
        os.chdir(temporary)
        tasks(Path(temporary))
        manager = TaskManager(include_path="tasks")
        for name in sys.argv[1:] or ("qwen2_5_vl", "llava"):
            family(manager, name)
        module = [sys.executable, "-m"]
        command("qwen2_5_vl", [*module, "lmms_eval"], "one process")
        several = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "lmms_eval"]
        command("qwen2_5_vl", [*module, *several], "two processes")
        os.chdir(before)
    print(f"{len(FAILED)} comparisons failed")
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()
