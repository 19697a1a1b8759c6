"""All settings, as frozen dataclasses: defaults are the paper's where it states them (METHOD, Table 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from .settings import Amount, Count, Limits, Positive, Section, Share, merge, read_override, read_yaml

SectionT = TypeVar("SectionT", bound=Section)

Kind = Literal["short", "long"]
KINDS: tuple[Kind, Kind] = ("short", "long")


@dataclass(frozen=True)
class QueryConfig(Section):
    """The query builder B (Eq. 5, 9-11)."""

    builder: str = "encoder"
    """Registered name: ``encoder`` (the paper's) or ``cross`` (only the queries attend)."""
    length: Positive = 8
    """K, the number of query vectors."""
    layers: Positive = 2
    heads: Positive = 4
    width: Count = 0
    """Inner width; 0 takes the language model's width d, at most 256: the paper says light, and no number."""


@dataclass(frozen=True)
class FormerConfig(Section):
    """One memory former, F_s or F_l (Eq. 6)."""

    name: str = "lora"
    """Registered name: ``lora`` (the paper's) or ``transformer`` (a small stand-alone encoder)."""
    length: Positive = 8
    """N, the number of latent vectors."""
    context: Literal["cache", "recompute"] = "cache"
    """What X is: the states the base already computed, or the tower run again with the former switched on."""
    rank: Positive = 16
    alpha: Positive = 32
    dropout: Share = 0.1
    layers: Positive = 2
    """Depth of the ``transformer`` former."""


@dataclass(frozen=True)
class PolicyConfig(Section):
    """What of the policy Stage II trains by GRPO."""

    trains: Literal["rows", "lora"] = "rows"
    """The four tokens' rows, or a LoRA on the language model as well; it acts on what follows the prompt."""
    rank: Positive = 16
    alpha: Positive = 32


@dataclass(frozen=True)
class MemoryConfig(Section):
    """What is attached to a model, and saved beside the trained weights."""

    query: QueryConfig = field(default_factory=QueryConfig)
    short: FormerConfig = field(default_factory=lambda: FormerConfig(length=8))
    long: FormerConfig = field(default_factory=lambda: FormerConfig(length=16))
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    trigger: str = "policy"
    """Trigger spec ``NAME[:ARGUMENT][@KIND]``, such as ``random:0.5`` or ``policy@short``."""
    budget: Count = 8
    """Invocations allowed per answer."""
    distance: Count = 8
    """Tokens that must lie between an end token and the next invocation."""
    delimiters: tuple[str, ...] = (",", ".", ";", ":", "?", "!", "\n")
    """Where a thought ends: triggers may invoke there, and the four tokens start as copies of the first one."""
    places: Literal["text", "image"] = "text"
    """Where latents stand: behind what was written, or at the positions of the row's image tokens, spread over them,
    with the text's positions going on as if nothing had come between. A base finds what stands where an image stood
    with the circuits that read images; it costs the packed and compiled passes."""
    drop_image_after_invocation: bool = False
    """Image tokens leave a row's KV cache once its first memory is formed: long answers without them. Their columns are
    given up, unless the model has layers with a sliding window: there they are only masked."""
    compile: bool = False
    """Compile the decode step, those in which memory is formed or enters too. Without it that is done where
    ``generate`` would: with ``cache_implementation="static"`` on a GPU."""


@dataclass(frozen=True)
class StageConfig(Section):
    """One training stage."""

    steps: Count = 1000
    batch: Positive = 8
    lr: Amount = 5e-5
    warmup: Share = 0.2
    """Share of the steps over which the rate rises."""
    weight_decay: Amount = 0.01
    clip: Amount = 1.0
    """Largest gradient norm."""
    anywhere: Share = 0.0
    """Share of the answers in which memory is invoked at any position, not only where a thought ended."""


@dataclass(frozen=True)
class PolicyStageConfig(StageConfig):
    """One training stage by GRPO; a batch is so many prompts, each with its group."""

    beta: Amount = 0.015
    """What the KL to the stage's starting values weighs at first; it adapts. 0 leaves the KL out."""
    target_kl: Amount = 0.03
    """KL per token that beta steers towards."""


@dataclass(frozen=True)
class GrpoConfig(Section):
    """Two-stage GRPO (Sec. 3.4, Table 4)."""

    formation: PolicyStageConfig = field(default_factory=PolicyStageConfig)
    invocation: PolicyStageConfig = field(
        default_factory=lambda: PolicyStageConfig(lr=1e-5, warmup=0.1, beta=0.030, target_kl=0.05)
    )
    rewards: tuple[str, ...] = ("exact",)
    """Specs ``[WEIGHT*]NAME[:ARGUMENT]``; their weighted mean is S."""
    patience: Amount = 600.0
    """Seconds that a reward waits for a service that is away, such as a judge, before the run is saved and ends."""
    resample: Count = 0
    """How often a step may draw further prompts in place of those whose trajectories all scored alike, which teach
    nothing (dynamic sampling of DAPO, arXiv 2503.14476)."""
    group: Annotated[int, Limits(2)] = 16
    """G, trajectories per prompt; one alone has nothing to be compared with."""
    temperature: Amount = 1.0
    top_p: Share = 1.0
    max_new_tokens: Positive = 256
    """Longest trajectory."""
    clip: Share = 0.2
    aggregate: Literal["sequence", "token"] = "sequence"
    """What the loss is a mean over: trajectories of their tokens' means (the paper), or all tokens alike."""
    scaled: bool = True
    """Divide advantages by the group's standard deviation (the paper)."""
    density: Share = 1.0
    """Stage I: chance that memory is invoked where a thought ended."""
    between: Share = 0.1
    """Stage I: the same chance at any other token, once the curriculum gets there."""
    between_from: Share = 0.5
    """Stage I: share of the steps after which memory is invoked between delimiters too."""
    settled: Share = 0.1
    """Stage I: share that is kept of the prompts which the base answers right without memory; further ones are drawn in
    place of the others. 1 is the paper's form, in which memory mostly learns not to disturb such answers."""
    alpha: Amount = 0.3
    """Stage II: weight of p_type + p_neg (Eq. 8)."""
    cost: Amount = 0.1
    """Stage II: what each invocation takes from the reward, lest memory be asked where it changes nothing. The paper
    has no such term: 0."""
    explore: Share = 0.75
    """Stage II: share of each group that is dealt its choice, in threes: none, short and long in the same state. 0 is
    the paper's form, in which an invocation that the policy never samples is never learnt."""
    slots: Positive = 8192
    """Positions, prompts and padding included, in one replay pass: a larger batch is replayed in parts."""
    checkpointing: bool = False
    """Replay computes the layers again in the backward pass instead of keeping their insides."""


@dataclass(frozen=True)
class EvaluationConfig(Section):
    """Held-out evaluation while a stage trains, on the same questions each time."""

    every: Count = 0
    """Steps between two, and a last one at a stage's end; 0: none."""
    samples: Positive = 20
    """Held-out samples per question type."""
    keep: Literal["last", "best"] = "last"
    """What a stage ends with: what its last step left, or what was best in its evaluations."""
    patience: Count = 0
    """Evaluations without an improvement after which a stage ends; 0: never."""
    min_delta: Amount = 0.0
    """What counts as an improvement there: more than this over the best so far."""
    shown: Count = 4
    """Answers that each evaluation writes to ``samples.jsonl``."""


@dataclass(frozen=True)
class TrainConfig(Section):
    """A training run."""

    stage: Literal["formation", "invocation", "all"] = "all"
    objective: Literal["sft", "grpo", "sft+grpo"] = "sft"
    """Cross-entropy, two-stage GRPO, or GRPO after Stage I by cross-entropy as a warm start."""
    memory: str = ""
    """Folder or hub id of a trained memory to go on from; without it memory begins untrained."""
    seed: Count = 0
    formation: StageConfig = field(default_factory=StageConfig)
    invocation: StageConfig = field(default_factory=lambda: StageConfig(lr=1e-5, warmup=0.1, anywhere=0.5))
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    image_dropout: Share = 0.0
    """Chance that an answer's image tokens are hidden from all that follows an invocation, so that memory must tell."""
    trackers: tuple[str, ...] = ()
    """Where figures go besides ``metrics.jsonl``: ``tensorboard``, ``wandb``, ``trackio``, by way of accelerate."""
    end_rate: Amount = 0.1
    """Learning rate of the end tokens' rows relative to the invocation tokens' rows."""
    cost: float = 0.1
    """What an invocation must add to an answer's score (0 to 1) to be worth it, in Stage II's objective ``sft``."""
    temperature: float = 0.1
    """Difference in worth that makes one choice e times as likely as another, in Stage II."""
    save_every: Positive = 100
    """Steps between two states that ``--resume`` can go on from."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    callbacks: tuple[str, ...] = ()
    """Who is told of each step and may end a stage: specs ``NAME[:ARGUMENT]``; see ``docs/plugins/callbacks.md``."""
    metric: str = "exact"
    """How answers are judged, in the closing report and in evaluations: a spec ``NAME[:ARGUMENT]``."""
    eval_samples: Positive = 100
    """Held-out samples per question type in the closing report."""
    eval_batch: Positive = 50
    max_new_tokens: Positive = 64
    """Longest answer in the closing report, in tokens."""


@dataclass(frozen=True)
class Config(Section):
    """Everything a configuration file may hold."""

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def load(path: Path | None = None, overrides: Sequence[str] = (), base: Config | None = None) -> Config:
    """The settings of a YAML file, then of ``key=value`` texts such as ``train.formation.lr=1e-3``, over ``base``.

    Raises:
        ConfigError: an unreadable file, an unknown key (with the nearest known one), a value of the wrong type or
            outside its limits; the message starts with ``file:line`` or the override.
    """
    config = base or Config()
    if path is not None:
        content, place = read_yaml(path)
        config = merge(config, content or {}, place)
    for text in overrides:
        config = merge(config, *read_override(text))
    return config


def to_dict(config: Section) -> dict[str, Any]:
    """Settings as plain nested dicts, ready for JSON or YAML."""
    return asdict(config)


def from_dict(cls: type[SectionT], data: Mapping[str, Any], source: str = "") -> SectionT:
    """Settings from what ``to_dict`` gave, perhaps by way of JSON; keys left out keep their defaults.

    Raises:
        ConfigError: as ``load``; the message starts with ``source``, the file the data came from.
    """
    return merge(cls(), data, lambda key: f"{source}: " if source else "")
