"""lmms-eval on a model with memory: the same answers as vismem's own, and memory is invoked.

    pip install lmms-eval decord "filelock<3.20"
    python tests/clients/by_hand/lmms_eval_mosaic.py

It is no part of the test suite: lmms-eval takes minutes to install, and other versions of packages than vismem's own.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL
from lmms_eval.tasks import TaskManager

import vismem_core as vismem
from vismem_core.answers.inference import answers
from vismem_plugins.mini import path
from vismem_plugins.mosaic import mosaic

TASK = """
task: mosaic_by_hand
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8}
process_results: !function utils.results
metric_list: [{metric: exact, aggregation: mean, higher_is_better: true}]
"""
UTILS = """
from PIL import Image

SEEN = []


def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["prompt"]


def results(doc, found):
    print("ANSWER", doc["id"], found[0].strip())
    return {"exact": float(found[0].strip() == doc["answer"])}
"""


def main() -> None:
    """Ten questions, by lmms-eval and by vismem."""
    samples = mosaic("heldout", types=["most", "right", "read"])[:10]
    place, pixels = str(path("qwen2_5_vl")), {"min_pixels": 28 * 28, "max_pixels": 252 * 252}  # its pictures are small
    model = Qwen2_5_VL(pretrained=place, device="cpu", device_map="cpu", batch_size=2, **pixels)
    base = model.model
    memory = vismem.attach(base, model.processor, path("qwen2_5_vl") / "memory")
    ours = [own.text for own in answers(memory, samples, max_new_tokens=8, batch=2)]
    invoked, generate = [], base.generate

    def counting(*args: Any, **kwargs: Any) -> Any:
        result = generate(*args, **kwargs)
        invoked.append(len(memory.trace))
        return result

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = []
        for own in samples:
            file = folder / f"{own.id.replace('/', '_')}.png"
            own.load_images()[0].save(file)
            rows.append({"id": own.id, "image": str(file), "prompt": own.prompt, "answer": own.answer})
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        (folder / "task.yaml").write_text(TASK.replace("ROWS", str(folder / "rows.jsonl")), encoding="utf-8")
        (folder / "utils.py").write_text(UTILS, encoding="utf-8")
        base.generate = counting
        manager = TaskManager(include_path=str(folder))
        found = simple_evaluate(model=model, tasks=["mosaic_by_hand"], task_manager=manager, log_samples=True)
        theirs = [row["filtered_resps"][0].strip() for row in found["samples"]["mosaic_by_hand"]]
    print(f"lmms-eval {theirs}\nvismem    {ours}\ninvocations {sum(invoked)}")
    assert theirs == ours and sum(invoked)


if __name__ == "__main__":
    main()
