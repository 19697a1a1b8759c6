"""``vismem infer``: answers, and which memory was invoked where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import track
from rich.text import Text

from vismem_core.bases import embedded
from vismem_core.data import Dataset, Sample, open_dataset, question
from vismem_core.errors import CheckpointError
from vismem_core.results import Results

from . import options
from .console import err, out, print_json, say
from .report import list_skipped, tell_skipped
from .sources import LoadOptions, check_names, memory_source, open_memory, tell_unknown

if TYPE_CHECKING:
    from vismem_core.inference import Answer

EXAMPLE = "Example: vismem infer --memory runs/first --image photo.jpg --prompt 'what is most frequent ?'"
COLOURS = {"short": "bold cyan", "long": "bold magenta"}


def infer(
    memory: options.Memory = None,
    image: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="An image; repeat it for several.")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The question.")] = None,
    data: options.Data = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSONL file for the answers to --data; answers it already holds are kept."),
    ] = None,
    trigger: Annotated[
        str | None,
        typer.Option(metavar="RULE", help="Who invokes memory: policy, never, random:0.5, policy@short, ..."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the question, the answer and its invocations (.png, .svg, .pdf)."),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 256,
    batch: options.Batch = 16,
    backbone: options.Backbone = None,
    model: options.Model = None,
    any_base: options.AnyBase = False,
    on_bad_sample: options.OnBad = options.OnBadSample.fail,
    allow_outside: options.AllowOutside = False,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DType.auto,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Answer a question, or a file of questions, and show where which memory was invoked.

    Without any option, the shipped memory answers a shipped question.
    """
    if (data is None) != (output is None):
        raise typer.BadParameter("--data and --output go together", param_hint="--data / --output")
    if data is not None and (image or picture or prompt is not None):
        raise typer.BadParameter("give either --data, or --image, --prompt and --picture", param_hint="--data")
    check_names(backbone, trigger=trigger)
    load = LoadOptions(memory, backbone, model, any_base, dtype.value, device, trust_remote_code, revision)
    ask: dict[str, Any] = {"trigger": trigger, "max_new_tokens": max_new_tokens, "batch": batch}
    if data is not None and output is not None:
        samples = open_dataset(
            data, "heldout", need_answer=False, on_bad=on_bad_sample.value, allow_outside=allow_outside
        )
        report = _answer_all(load, samples, output, ask)
        tell_skipped(samples)
        if as_json:
            print_json(report)
        return
    if picture is not None:
        from vismem_core.picture import check

        check(picture)
    sample = _sample(load, image or [], prompt)
    answer = _answer(load, sample, ask)
    if as_json:
        print_json(answer.to_dict())
    else:
        _show(sample, answer)
    if picture is not None:
        from vismem_core.picture import draw

        draw(answer, sample, picture)


def _sample(load: LoadOptions, images: list[Path], prompt: str | None) -> Sample:
    """The question asked, or else the one that ships with the embedded model."""
    if prompt is not None:
        return question(prompt, images)
    if images or load.memory or load.model:
        raise typer.BadParameter("what is the question? add --prompt TEXT", param_hint="--prompt")
    name, base = embedded(load.backbone)
    if base.prompt is None:
        raise CheckpointError(f"no question ships with {name}; add --prompt TEXT and --image FILE")
    return question(base.prompt, [base.image] if base.image else [])


def _answer(load: LoadOptions, sample: Sample, ask: dict[str, Any]) -> Answer:
    memory = open_memory(load)
    tell_unknown(memory.backbone.processor, [sample.prompt])

    from vismem_core.inference import answers

    (answer,) = answers(memory, [sample], **ask)
    return answer


def _answer_all(load: LoadOptions, samples: Dataset, output: Path, ask: dict[str, Any]) -> dict[str, Any]:
    """Answers what the output file does not hold yet; returns the summary."""
    with Results(output, _made(load, ask)) as results:
        left = results.left(samples)
        if left:
            memory = open_memory(load)

            from vismem_core.inference import answers

            told = track(answers(memory, left, **ask), "answering", total=len(left), console=err)
            for sample, answer in zip(left, told, strict=True):
                results.add({"id": sample.id, "question": sample.digest()} | answer.to_dict())
    kept = len(samples) - len(left)
    say(f"written to {output}: {len(left)} of {len(samples)} answers, {kept} were there already")
    return {"output": str(output), "answered": len(left), "kept": kept, "skipped": list_skipped(samples)}


def _made(load: LoadOptions, ask: dict[str, Any]) -> dict[str, Any]:
    """What an answer depends on, for its row: answers made otherwise belong into another file."""
    from vismem_core.checkpoint import description, locate

    about = description(locate(memory_source(load)))
    return {
        "memory": about["weights"],
        "model": load.model,
        "trigger": ask["trigger"] or about["memory"]["trigger"],
        "max_new_tokens": ask["max_new_tokens"],
    }


def _show(sample: Sample, answer: Answer) -> None:
    """The answer on stdout with its invocations as marks; the question on stderr."""
    for name in sample.images:
        say(f"image   {name}")
    say(f"prompt  {sample.prompt}")
    out.print(marked(answer.marked), soft_wrap=True)
    kinds = [invocation.kind for invocation in answer.invocations]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in COLOURS if kind in kinds)
    say(f"memory  {counts or 'not invoked'}")


def marked(text: str) -> Text:
    """A text with ``‹short›`` and ``‹long›`` set in colour."""
    shown = Text(text)
    for kind, colour in COLOURS.items():
        shown.highlight_words([f"‹{kind}›"], colour)
    return shown
