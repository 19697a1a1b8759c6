"""The causal probe: what an answer owes to the latents of one invocation, and what these hold.

Everything but the latents is held fixed: prompt, image, place and number of invocations, decoding. Memory is invoked at
the answer's start, and what it formed enters, or something else does in its place (:data:`CONDITIONS`). Answers are
written, and the right answer's log-likelihood is taken, which tells more than accuracy where that is high or low.

What is found is told by rules that are fixed here (:func:`verdict`), whatever comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vismem_core.answers.evaluation import pick, swapped
from vismem_core.answers.inference import answers
from vismem_core.answers.metric import Metric, parse
from vismem_core.base import cache as kv
from vismem_core.base import outlook
from vismem_core.config import KINDS, Kind
from vismem_core.decoding.replay import read_prompts
from vismem_core.errors import DataError, nearest
from vismem_core.files.samples import Sample, asked
from vismem_core.memory.controls import noise, repeated, zero
from vismem_core.memory.memory import Memory
from vismem_core.memory.tokens import NAMES
from vismem_core.memory.trace import Invocation, Trace
from vismem_core.training.trainable import collate

from .statistics import paired

OWN = "own"
CONDITIONS: Mapping[str, str] = {
    OWN: "what memory formed",
    "zero": "zeros",
    "noise": "noise, each latent as large as it was",
    "noise like memory": "noise of the mean and covariance that memories have",
    "first repeated": "the first latent in all places",
    "mean memory": "the mean of all questions' memories",
    "pause tokens": "a delimiter in all places",
    "markers only": "nothing between the two tokens",
    "another image": "memory of the same question about another image",
    "another question": "memory of another question about the same image",
    "other kind": "memory of the other kind",
}
BATCH = 50
RIDGE = (1e-1, 1e0, 1e1, 1e2, 1e3)
"""Strengths of the linear probe's penalty, in units of the features' mean square; chosen on a third part."""


@dataclass(frozen=True)
class Asked:
    """Questions that are probed: each with its twin over another image, and with another question's prompt."""

    own: list[Sample]
    image: list[Sample]
    question: list[Sample]


def probe(
    memory: Memory,
    samples: Sequence[Sample],
    *,
    types: Sequence[str] | None = None,
    per_type: int = 100,
    max_new_tokens: int = 16,
    metric: str = "exact",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Probe both kinds of memory.

    Args:
        types: of question; by default all.
        progress: called with what is done, and how many of how many conditions are.

    Returns:
        For each kind ``conditions`` (accuracy, log-likelihood per token, and their differences from ``own``),
        ``left_out`` (the same with each latent's mean in its place), ``hidden`` (the same conditions without images
        in sight, where the model can), ``alike`` (mean cosines of memories) and ``verdict``; ``content``, how well a
        linear probe reads the image, where the data tells what is in it.

    Raises:
        DataError: there is nothing to ask.
    """
    judged, asked = parse(metric), _asked(samples, types, per_type)
    sights = (False, True) if _drops(memory) else (False,)
    steps, done = len(KINDS) * (len(sights) * len(CONDITIONS) + 1), 0
    told: dict[str, Any] = {"questions": len(asked.own), "metric": judged.name, "kinds": {}}
    latents = {kind: {part: _latents(memory, getattr(asked, part), kind) for part in vars(asked)} for kind in KINDS}

    def step(text: str) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(text, done, steps)

    for kind in KINDS:
        entering = _entering(memory, kind, latents)
        own: dict[str, Any] = {}
        for hidden in sights:
            scores = {}
            for name, vectors in entering.items():
                scores[name] = _score(memory, asked.own, kind, vectors, max_new_tokens, judged, hidden)
                step(f"{kind}: {name}{', images hidden' if hidden else ''}")
            own["hidden" if hidden else "conditions"] = _compared(scores)
        own["left_out"] = _each_left_out(memory, asked.own, kind, entering)
        step(f"{kind}: latents one by one")
        own["alike"] = _alike(latents[kind])
        own["verdict"] = verdict(kind, own)
        told["kinds"][kind] = own
    if (content := getattr(getattr(samples, "samples", samples), "content", None)) is not None:
        told["content"] = _content(memory, asked.own, latents, content)
    return told


def verdict(kind: str, told: Mapping[str, Any]) -> str:
    """What the figures say, in one sentence, by fixed rules.

    Latents *matter* where noise of their size makes the right answer clearly less likely. They are a *constant prompt*
    where neither their mean over questions nor noise like them does. They hold the *image* where another image's memory
    makes it less likely, and the *question* where another question's does. "Clearly" is an interval that leaves zero
    out, and a cost of at least a twentieth of that noise's. What the mean keeps, of the accuracy that memory adds to
    the markers alone, is a prompt's share.
    """
    table = told["conditions"]
    costs = {name: -own["likelihood"]["mean"] for name, own in table.items()}
    least = costs["noise"] / 20
    clear = {name: own["likelihood"]["high"] < 0 and costs[name] >= least for name, own in table.items()}
    begin = f"{kind}-term latents"
    if not clear["noise"]:
        return f"{begin} make no clear difference: noise of their size does as well."
    matter = f"{begin} matter (noise of their size costs {costs['noise']:.2f} nats a token)"
    if not (clear["mean memory"] or clear["noise like memory"]):
        return f"{matter} as a constant prompt: their mean over all questions does as well, and noise like them does."
    holds = [name for name in ("image", "question") if clear[f"another {name}"]]
    what = f"hold the {' and the '.join(holds)}" if holds else "hold neither the image nor the question"
    costly = ", ".join(f"another {name}'s cost {costs[f'another {name}']:.2f}" for name in ("image", "question"))
    added = table[OWN]["accuracy"] - table["markers only"]["accuracy"]
    kept = table["mean memory"]["accuracy"] - table["markers only"]["accuracy"]
    share = (
        f"; their mean, a constant prompt, keeps {kept / added:.0%} of the accuracy they add" if added > 0.02 else ""
    )
    return f"{matter} and {what} ({costly}){share}."


def _asked(samples: Sequence[Sample], types: Sequence[str] | None, per_type: int) -> Asked:
    chosen = pick(samples, per_type)
    for kind in types or ():
        if kind not in chosen:
            raise DataError(f"there is no type or group of questions {kind!r}; {nearest(kind, chosen)}")
    chosen = {kind: own for kind, own in chosen.items() if types is None or kind in types}
    twins = {own.id: own for part in swapped(chosen).values() for own in part}
    everyone = [own for part in chosen.values() for own in part]
    asked = Asked([], [], [])
    for at, own in enumerate(everyone):
        rest = (everyone[(at + step) % len(everyone)] for step in range(1, len(everyone)))
        other = next((one for one in rest if one.prompt != own.prompt and len(one.images) == len(own.images)), None)
        if own.id in twins and other is not None and own.answer is not None:
            asked.own.append(own)
            asked.image.append(twins[own.id])
            asked.question.append(replace(own, prompt=other.prompt))
    if not asked.own:
        raise DataError("there is nothing to probe: it takes questions with answers, over images that differ")
    return asked


def _batches(samples: Sequence[Sample]) -> list[slice]:
    return [slice(first, min(first + BATCH, len(samples))) for first in range(0, len(samples), BATCH)]


@torch.no_grad()
def _latents(memory: Memory, samples: Sequence[Sample], kind: Kind) -> Tensor:
    """What memory forms at the start of each answer, (Q, N, d)."""
    formed = []
    for part in _batches(samples):
        with memory.triggered(f"schedule:0={kind}"):
            inputs = memory.backbone.inputs(*asked(samples[part]))
            memory.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        found = sorted(memory.trace.invocations, key=lambda own: own.row)
        formed.append(torch.stack([own.latents for own in found]))
    return torch.cat(formed)


def _entering(memory: Memory, kind: Kind, latents: Mapping[Kind, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What enters under each condition, (Q, any number, d)."""
    own, other = latents[kind]["own"], latents[KINDS[1 - KINDS.index(kind)]]["own"]
    delimiter = torch.tensor([min(memory.delimiters)], device=memory.backbone.device)
    pause = memory.backbone.embeddings(delimiter).detach()
    return {
        OWN: own,
        "zero": zero(own),
        "noise": noise(own),
        "noise like memory": _like(own),
        "first repeated": repeated(own),
        "mean memory": own.mean(0, keepdim=True).expand_as(own),
        "pause tokens": pause.to(own).expand_as(own),
        "markers only": own[:, :0],
        "another image": latents[kind]["image"],
        "another question": latents[kind]["question"],
        "other kind": other,
    }


def _like(own: Tensor) -> Tensor:
    """Normal noise (Q, N, d) of each place's mean and covariance over questions."""
    generator, centred = torch.Generator().manual_seed(0), (own - own.mean(0)).float()
    mixed = torch.randn(len(own), len(own), generator=generator).to(centred) / max(1, len(own) - 1) ** 0.5
    return (own.mean(0).float() + torch.einsum("qp,pnd->qnd", mixed, centred)).to(own)


def _score(
    memory: Memory, samples: Sequence[Sample], kind: Kind, vectors: Tensor, tokens: int, metric: Metric, hidden: bool
) -> tuple[list[float], list[float]]:
    """Score and log-likelihood per token of each answer, with ``vectors`` in the place of its memory."""
    before = memory.config
    memory.config = replace(before, drop_image_after_invocation=hidden)
    try:
        texts, likely = [], []
        for part in _batches(samples):
            given = vectors[part]

            def instead(latents: Tensor, given: Tensor = given) -> Tensor:
                if len(latents) != len(given):
                    raise DataError("a prompt leaves no room for memory at its answer's start")
                return given

            with memory.replaced(instead):
                told = answers(memory, samples[part], max_new_tokens=tokens, batch=BATCH, trigger=f"schedule:0={kind}")
                texts += [own.text for own in told]
            likely += _likelihood(memory, samples[part], kind, given)
    finally:
        memory.config = before
    return metric(texts, samples), likely


@torch.no_grad()
def _likelihood(memory: Memory, samples: Sequence[Sample], kind: Kind, vectors: Tensor) -> list[float]:
    """The mean log-likelihood of each right answer's tokens after memory that holds ``vectors``."""
    mark = NAMES[KINDS.index(kind)] + NAMES[len(KINDS) + KINDS.index(kind)]
    rows = [{"prompt": own.prompt, "images": own.load_images(), "answer": mark + str(own.answer)} for own in samples]
    batch = collate(memory, rows)
    labels = batch.pop("labels")
    trace = Trace([Invocation(row, kind, 0, own) for row, own in enumerate(vectors)])
    with memory.recalled(trace):
        logits = memory.model(**batch).logits[:, :-1].float()
    labels = labels[:, 1:].clone()
    labels[labels >= memory.tokens.first] = -100  # the invocation is forced
    told = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    mask = labels >= 0
    means: list[float] = ((told * mask).sum(1) / mask.sum(1)).tolist()
    return means


def _compared(scores: Mapping[str, tuple[list[float], list[float]]]) -> dict[str, Any]:
    own_scores, own_likely = scores[OWN]
    return {
        name: {
            "accuracy": fmean(got),
            "log-likelihood": fmean(likely),
            "score": asdict(paired([got], [own_scores])),
            "likelihood": asdict(paired([likely], [own_likely])),
        }
        for name, (got, likely) in scores.items()
    }


def _each_left_out(memory: Memory, samples: Sequence[Sample], kind: Kind, entering: Mapping[str, Tensor]) -> list[Any]:
    """What the likelihood loses where one latent is its mean over questions, latent by latent."""
    own, mean = entering[OWN], entering["mean memory"]

    def likely(vectors: Tensor) -> list[float]:
        return [one for part in _batches(samples) for one in _likelihood(memory, samples[part], kind, vectors[part])]

    whole = likely(own)
    told = []
    for at in range(own.shape[1]):
        changed = own.clone()
        changed[:, at] = mean[:, at]
        told.append(asdict(paired([likely(changed)], [whole])))
    return told


def _alike(latents: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean cosines of memories (of their latents place by place): about other images, of other questions, of others
    altogether, and of the latents within one memory."""

    def cosine(one: Tensor, other: Tensor) -> float:
        return float(torch.cosine_similarity(one.float(), other.float(), dim=-1).mean())

    own = latents["own"]
    pairs = list(combinations(range(own.shape[1]), 2))
    return {
        "another image": cosine(own, latents["image"]),
        "another question": cosine(own, latents["question"]),
        "both": cosine(own, own.roll(1, 0)),
        "within": fmean(cosine(own[:, one], own[:, other]) for one, other in pairs) if pairs else 1.0,
    }


def _drops(memory: Memory) -> bool:
    """Whether images can leave this model's cache, in decoding and in replay."""
    kept: Any = DynamicCache(config=memory.model.config.get_text_config(decoder=True))
    return not outlook.keeps_images(memory.model.config) and kv.whole(kept)


def _content(
    memory: Memory,
    samples: Sequence[Sample],
    latents: Mapping[Kind, Mapping[str, Tensor]],
    content: Callable[[Sample], Mapping[str, str]],
) -> dict[str, Any]:
    """How well a linear probe reads what is in the image, of short and long latents, of the visual tokens, and of the
    latents where labels are shuffled: the mean accuracy over what is asked about, on a fifth that was not fitted."""
    visual = _visual(memory, samples)
    sizes = [len(own) for own in visual]
    usual = max(set(sizes), key=sizes.count)
    rows = [at for at, size in enumerate(sizes) if size == usual]
    facts = [content(samples[at]) for at in rows]
    names = [name for name in facts[0] if all(name in own for own in facts)]
    features = {
        "visual tokens": torch.stack([visual[at] for at in rows]).flatten(1),
        **{f"{kind}-term latents": latents[kind]["own"][rows].flatten(1) for kind in KINDS},
    }
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    told: dict[str, Any] = {"questions": len(rows), "read": names}
    for name, own in features.items():
        told[name] = fmean(_read(own.float().cpu(), [fact[key] for fact in facts]) for key in names)
    shuffled = [[facts[at][key] for at in order.tolist()] for key in names]
    told["shuffled labels"] = fmean(_read(features["long-term latents"].float().cpu(), own) for own in shuffled)
    return told


@torch.no_grad()
def _visual(memory: Memory, samples: Sequence[Sample]) -> list[Tensor]:
    """Each question's projected visual tokens, (T, d)."""
    told = []
    for part in _batches(samples):
        session = read_prompts(memory, memory.backbone.inputs(*asked(samples[part]))).session
        seen, mask = session.visual(list(range(len(samples[part]))))
        told += [own[there] for own, there in zip(seen, mask, strict=True)]
    return told


def _read(features: Tensor, labels: Sequence[str]) -> float:
    """Accuracy of a ridge regression onto the labels, on the last fifth; the fifth before chooses the penalty."""
    classes = sorted(set(labels))
    wanted = torch.tensor([classes.index(own) for own in labels])
    targets = torch.nn.functional.one_hot(wanted, len(classes)).double()
    first, second = len(labels) * 3 // 5, len(labels) * 4 // 5
    features = features.double()
    features = (features - features[:first].mean(0)) / features[:first].std().clamp(min=1e-9)
    kernel, scale = features @ features[:first].T, features[:first].pow(2).sum(1).mean().clamp(min=1.0)
    best = (-1.0, 0.0)
    for strength in RIDGE:
        penalty = strength * scale / first * torch.eye(first, dtype=torch.float64)
        weights = torch.linalg.solve(kernel[:first] + penalty, targets[:first] - targets[:first].mean(0))
        right = (kernel @ weights + targets[:first].mean(0)).argmax(1) == wanted
        best = max(best, (float(right[first:second].double().mean()), float(right[second:].double().mean())))
    return best[1]
