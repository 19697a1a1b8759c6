"""``vismem infer``: answers, and which memory was invoked where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import track
from rich.text import Text

from vismem_core.base.embedded import embedded
from vismem_core.errors import CheckpointError, VismemError, cut
from vismem_core.files.reading import FRAMES
from vismem_core.files.results import Results
from vismem_core.files.samples import Dataset, OnBad, Sample, Skipped, open_dataset, question, read

from . import completion, options
from .console import FIRST, err, out, print_json, say
from .report import list_skipped, tell_skipped
from .sources import LoadOptions, check_names, check_rows, memory_source, open_memory, tell_unknown

if TYPE_CHECKING:
    from vismem_core import Memory
    from vismem_core.answers.inference import Answer

EXAMPLE = "Example: vismem infer --memory runs/first --image photo.jpg --prompt 'what is most frequent ?'"
COLOURS = {"short": "bold cyan", "long": "bold magenta"}


def infer(
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="An image; repeat it for several.", rich_help_panel=options.DATA),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The question.", rich_help_panel=options.DATA)
    ] = None,
    data: options.Data = None,
    columns: options.Columns = None,
    on_bad_sample: options.OnBad = options.OnBadSample.fail,
    check: options.Check = options.CheckRows.all,
    allow_outside: options.AllowOutside = False,
    allow_urls: options.AllowUrls = False,
    frames: options.Frames = FRAMES,
    memory: options.Memory = None,
    trigger: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="Who invokes it: policy, never, random:0.5, ...",
            autocompletion=completion.triggers,
            rich_help_panel=options.MEMORY,
        ),
    ] = None,
    any_base: options.AnyBase = False,
    backbone: options.Backbone = None,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DType.auto,
    batch: options.Batch = 16,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="JSONL for answers to --data; keeps those it has.", rich_help_panel=options.OUTPUT
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the answer (.png, .svg, .pdf).", rich_help_panel=options.OUTPUT),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A page: where queries looked, latents' worth.", rich_help_panel=options.OUTPUT
        ),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 256,
    as_json: options.Json = False,
) -> None:
    """Answer a question, or a file of questions, and show where which memory was invoked.

    Without any option, the shipped memory answers a shipped question.
    """
    if (data is None) != (output is None):
        raise typer.BadParameter("--data and --output go together", param_hint="--data / --output")
    if data is not None and (image or picture or html or prompt is not None):
        told = "give either --data, or --image, --prompt, --picture and --html"
        raise typer.BadParameter(told, param_hint="--data")
    check_names(backbone, trigger=trigger)
    load = LoadOptions(memory, backbone, model, any_base, dtype.value, device, trust_remote_code, revision)
    ask: dict[str, Any] = {"trigger": trigger, "max_new_tokens": max_new_tokens, "batch": batch}
    if data is not None and output is not None:
        samples = open_dataset(
            data,
            "heldout",
            need_answer=False,
            on_bad=on_bad_sample.value,
            allow_outside=allow_outside,
            urls=allow_urls,
            frames=frames,
            columns=options.named_columns(columns),
        )
        left_out = list(samples.skipped)
        report = _answer_all(load, samples, output, ask, on_bad_sample.value, check.value, left_out)
        tell_skipped(left_out)
        if as_json:
            print_json(report | {"skipped": list_skipped(left_out)})
        return
    if picture is not None:
        from vismem_core.answers import picture as drawing

        drawing.check(picture)
    if html is not None and (html.is_dir() or not html.parent.is_dir()):
        raise VismemError(f"{html}: " + ("is a folder" if html.is_dir() else f"there is no folder {html.parent}"))
    sample = _sample(load, image or [], prompt)
    opened = open_memory(load)
    answer = _answer(opened, sample, ask)
    verdict = _judged(sample, answer)
    if as_json:
        print_json(answer.to_dict() | verdict)
    else:
        _show(sample, answer, verdict)
    if picture is not None and FIRST:
        drawing.draw(answer, sample, picture)
    if html is not None:
        from vismem_core.experiments import look

        looked = look.look(opened, sample, max_new_tokens=max_new_tokens, trigger=trigger)
        if FIRST:
            look.write(looked, html)


def _sample(load: LoadOptions, images: list[Path], prompt: str | None) -> Sample:
    """The question asked, or else the one that ships with the embedded model."""
    if prompt is not None:
        return question(prompt, images)
    if images or load.memory or load.model:
        raise typer.BadParameter("what is the question? add --prompt TEXT", param_hint="--prompt")
    name, base = embedded(load.backbone)
    if base.samples is None:
        raise CheckpointError(f"no question ships with {name}; add --prompt TEXT and --image FILE")
    return read(base.samples, need_answer=False)[0]


def _answer(memory: Memory, sample: Sample, ask: dict[str, Any]) -> Answer:
    tell_unknown(memory.backbone.processor, [sample.prompt])

    from vismem_core.answers.inference import answers

    (answer,) = answers(memory, [sample], **ask)
    if why := memory.trace.why():
        say(why)
    return answer


def _answer_all(
    load: LoadOptions,
    samples: Dataset,
    output: Path,
    ask: dict[str, Any],
    on_bad: OnBad,
    check: str,
    left_out: list[Skipped],
) -> dict[str, Any]:
    """Answers what the output file does not hold yet; returns the summary.

    Args:
        left_out: gets the rows that cannot be used, if ``on_bad`` is ``skip``.
    """
    answered, judged = 0, list[bool]()
    with Results(output, _made(load, ask), writes=FIRST) as results:
        left = results.left(samples)
        if left:
            memory = open_memory(load)

            from vismem_core.answers.inference import answers

            usable = check_rows(memory, samples.only(left), on_bad, check)
            left_out += usable.skipped
            questions = iter(usable)
            told = answers(memory, usable, left_out=left_out if on_bad == "skip" else None, **ask)
            for answer in track(told, "answering", total=len(usable), console=err):
                asked = next(own for own in questions if own.id == answer.sample_id)  # some may be left out
                verdict = _judged(asked, answer)
                results.add({"id": asked.id, "question": asked.digest()} | answer.to_dict() | verdict)
                judged += [verdict["right"]] if verdict else []
                answered += 1
    kept, rows = len(samples) - len(left), len(samples) + len(samples.skipped)
    lost = f", {len(left_out)} rows left out" if left_out else ""
    right = f"; {sum(judged)} of {len(judged)} new ones are as their references" if judged else ""
    say(f"written to {output}: {answered} of {rows} answers, {kept} were there already{lost}{right}")
    counted = {"right": sum(judged), "with_reference": len(judged)} if judged else {}
    return {"output": str(output), "answered": answered, "kept": kept} | counted


def _made(load: LoadOptions, ask: dict[str, Any]) -> dict[str, Any]:
    """What an answer depends on, for its row: answers made otherwise belong into another file."""
    from vismem_core.files.checkpoint import description, locate, settings

    source = locate(memory_source(load))
    about = description(source)
    return {
        "memory": about["weights"],
        "model": load.model,
        "trigger": ask["trigger"] or settings(source).trigger,
        "max_new_tokens": ask["max_new_tokens"],
    }


def _judged(sample: Sample, answer: Answer) -> dict[str, Any]:
    """Whether the answer is the reference, where there is one."""
    if sample.answer is None:
        return {}
    from vismem_core.answers.evaluation import right

    return {"reference": sample.answer, "right": right(answer.text, sample)}


def _show(sample: Sample, answer: Answer, verdict: dict[str, Any]) -> None:
    """The answer on stdout with its invocations as marks; the question on stderr."""
    for image in sample.images or ("none",):
        say(f"image   {image if isinstance(image, Path | str) else 'embedded'}")
    say(f"prompt  {sample.prompt}")
    out.print(marked(answer.marked), soft_wrap=True)
    kinds = [invocation.kind for invocation in answer.invocations]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in COLOURS if kind in kinds)
    say(f"memory  {counts or 'not invoked'}")
    if verdict:
        say(f"right   {'yes' if verdict['right'] else 'no'}: the reference is {cut(verdict['reference'])!r}")


def marked(text: str) -> Text:
    """A text with ``‹short›`` and ``‹long›`` set in colour."""
    shown = Text(text)
    for kind, colour in COLOURS.items():
        shown.highlight_words([f"‹{kind}›"], colour)
    return shown
