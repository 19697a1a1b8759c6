"""The built-in implementations of every hook but the backbones."""

from vismem_core.hookspecs import Register, hookimpl


@hookimpl
def register_query_builders(register: Register) -> None:
    query = "vismem_plugins.query"
    register("encoder", f"{query}:EncoderQuery", description="an encoder over all states and the queries (the paper)")
    register("cross", f"{query}:CrossQuery", description="only the queries attend: cheaper")
    register("constant", f"{query}:ConstantQuery", description="the same queries always: a control")


@hookimpl
def register_formers(register: Register) -> None:
    formers = "vismem_plugins.formers"
    register("lora", f"{formers}.lora:lora", description="LoRA on the model's own towers (the paper)")
    register("transformer", f"{formers}.transformer:TransformerFormer", description="a small stand-alone encoder")
    register("constant", f"{formers}.constant:ConstantFormer", description="a soft prompt in its place: a control")
    register("pooled", f"{formers}.visual:PooledFormer", description="means of visual tokens in its place: a control")
    register("kept", f"{formers}.visual:KeptFormer", description="visual tokens in its place: a control")
    register("described", f"{formers}.described:DescribedFormer", description="words in its place: a control")


@hookimpl
def register_triggers(register: Register) -> None:
    triggers = "vismem_plugins.triggers"
    register("policy", f"{triggers}:policy", description="the model's own invocation tokens")
    register("never", f"{triggers}:never", description="no memory: the base model")
    register("random", f"{triggers}:random", description="random:P, with probability P at each delimiter")
    register("anywhere", f"{triggers}:anywhere", description="anywhere:P, with probability P at each token")
    register("schedule", f"{triggers}:schedule", description="at given positions of the answer")


@hookimpl
def register_datasets(register: Register) -> None:
    register("mosaic", "vismem_plugins.mosaic:mosaic", description="questions about grids of real photographs")


@hookimpl
def register_metrics(register: Register) -> None:
    metrics = "vismem_plugins.metrics"
    register("exact", f"{metrics}.text:exact", description="the same text, whatever its case and spacing")
    register("ending", f"{metrics}.text:ending", description="the same, of what follows the last colon")
    register("vqa", f"{metrics}.vqa:vqa", description="VQA accuracy: how many people gave this answer")
    register("anls", f"{metrics}.text:anls", description="likeness of spelling, from .5 on, as in DocVQA")
    register("relaxed", f"{metrics}.text:relaxed", description="numbers within 5%, as in ChartQA")
    register("f1", f"{metrics}.text:f1", description="words shared with a reference, as SQuAD counts them")
    register("choice", f"{metrics}.rewarded:choice", made=True, description="the right option, by letter or text")
    register("judge", f"{metrics}.rewarded:judge", made=True, description="judge:URL[#MODEL], a model's grade")
    register("bleu", f"{metrics}.overlap:bleu", made=True, description="BLEU of the whole set, by sacrebleu")
    register("rouge", f"{metrics}.overlap:rouge", made=True, description="ROUGE-L, by rouge-score")
    register("cider", f"{metrics}.overlap:cider", made=True, description="CIDEr-D, by pycocoevalcap, up to 10")


@hookimpl
def register_rewards(register: Register) -> None:
    rewards = "vismem_plugins.rewards"
    register("exact", f"{rewards}.text:exact", description="the reference, whatever its case and spacing")
    register("substring", f"{rewards}.text:substring", description="the reference, anywhere in the answer")
    register("f1", f"{rewards}.text:f1", description="words shared with the reference, as SQuAD counts them")
    register("choice", f"{rewards}.choice:choice", description="the right option, by its letter or its text")
    register("number", f"{rewards}.number:number", description="number:TOLERANCE, the answer's last number")
    register("math", f"{rewards}.mathematics:math", description="an equal expression, as math-verify finds")
    register("call", f"{rewards}.call:call", description="call:package.module:function, a reward of your own")
    register("judge", f"{rewards}.judge:judge", description="judge:URL[#MODEL], the grade a language model gives")


@hookimpl
def register_callbacks(register: Register) -> None:
    register("call", "vismem_plugins.callbacks:call", description="call:package.module:Class, one of your own")


@hookimpl
def register_bases(register: Register) -> None:
    for family in ("qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "internvl", "timm_lm"):  # the first is the default
        register(family, f"vismem_plugins.bases:mini_{family}", description="mini, trained on mosaic")
    wide = "vismem_plugins.bases:mini_qwen2_5_vl_wide"
    register(
        "qwen2_5_vl_wide", wide, description="mini of Qwen2.5-VL that knows digits too, and asides before a question"
    )


@hookimpl
def register_experiments(register: Register) -> None:
    recipes = "vismem_plugins.recipes"
    register("main", f"{recipes}:main", description="memory beside its rivals: LoRA, a soft prompt, functional tokens")
    register("ablation", f"{recipes}:ablation", description="who invokes, which kinds, which parts")
    register("lengths", f"{recipes}:lengths", description="how many latents of each kind, how many queries")
    register("backbones", f"{recipes}:backbones", description="what memory gains on each family's mini")
    register("cross-domain", f"{recipes}:cross_domain", description="memory of one image domain, asked about another")
    register(
        "forgetting", f"{recipes}:forgetting", description="new types one after the other: what is kept of the first"
    )
    register("recall", f"{recipes}:recall", description="what is left of an image that left the cache, by latents")
    register("invocation", f"{recipes}:invocation", description="where along an answer memory is invoked (Figure 5)")
    register("efficiency", f"{recipes}:efficiency", description="accuracy against the time of an answer (Figure 6)")
