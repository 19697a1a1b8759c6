"""The built-in backbones, one file per family of models."""

from vismem_core.hookspecs import Register, hookimpl


@hookimpl
def register_backbones(register: Register) -> None:
    register(
        "qwen2_5_vl",
        "vismem_backbones.qwen2_5_vl:Qwen2_5_VL",
        description="Qwen2.5-VL, 3B to 72B",
        families=("Qwen2.5-VL",),
        model_types=("qwen2_5_vl",),
        features=("several images", "images of any size", "video"),
    )
    register(
        "qwen3_vl",
        "vismem_backbones.qwen3_vl:Qwen3_VL",
        description="Qwen3-VL, 2B to 235B, dense and of experts",
        families=("Qwen3-VL",),
        model_types=("qwen3_vl", "qwen3_vl_moe"),
        features=("several images", "images of any size", "video"),
    )
    register(
        "qwen3_5",
        "vismem_backbones.qwen3_vl:Qwen3_5",
        description="Qwen3.5 and later, dense and of experts",
        families=("Qwen3.5",),
        model_types=("qwen3_5", "qwen3_5_moe"),
        features=("several images", "images of any size", "video"),
    )
    register(
        "gemma3",
        "vismem_backbones.gemma:Gemma3",
        description="Gemma 3, 4B to 27B, and ShieldGemma 2",
        families=("Gemma 3",),
        model_types=("gemma3", "shieldgemma2"),
        features=("several images",),
    )
    register(
        "gemma4",
        "vismem_backbones.gemma:Gemma4",
        description="Gemma 4, dense, of experts, and those with per-layer inputs",
        families=("Gemma 4",),
        model_types=("gemma4", "gemma4_unified"),
        features=("several images", "images of any size"),
    )
    register(
        "gemma3n",
        "vismem_backbones.gemma:Gemma3n",
        description="Gemma 3n (short memory without its vision encoder)",
        families=("Gemma 3n",),
        model_types=("gemma3n",),
        features=("several images",),
    )
    register(
        "paligemma",
        "vismem_backbones.gemma:PaliGemma",
        description="PaliGemma and PaliGemma 2",
        families=("PaliGemma",),
        model_types=("paligemma",),
        features=("several images",),
    )
    register(
        "internvl",
        "vismem_backbones.internvl:InternVL",
        description="InternVL3 and InternVL3.5 in their transformers format",
        families=("InternVL3", "InternVL3.5"),
        model_types=("internvl",),
        features=("several images", "tiles", "video"),
    )
    register(
        "llava_onevision1_5",
        "vismem_backbones.llava:LlavaOneVision15",
        description="LLaVA-OneVision-1.5, 4B and 8B (runs the checkpoint's own code: --trust-remote-code)",
        families=("LLaVA-OneVision-1.5",),
        model_types=("llavaonevision1_5",),
        features=("several images", "images of any size", "video"),
    )
    register(
        "llava_onevision",
        "vismem_backbones.llava:LlavaOneVision",
        description="LLaVA-OneVision, 0.5B to 72B",
        families=("LLaVA-OneVision",),
        model_types=("llava_onevision",),
        features=("several images", "tiles", "video"),
    )
    register(
        "llava_next",
        "vismem_backbones.llava:LlavaNext",
        description="LLaVA-NeXT (1.6)",
        families=("LLaVA-NeXT",),
        model_types=("llava_next",),
        features=("several images", "tiles"),
    )
    register(
        "llava",
        "vismem_backbones.llava:Llava",
        description="LLaVA-1.5",
        families=("LLaVA-1.5",),
        model_types=("llava",),
        features=("several images",),
    )
    register(
        "timm_lm",
        "vismem_backbones.timm_lm:TimmLM",
        description="A ViT of timm with any causal language model (as PerceptionLM)",
        families=("your own: vismem_backbones.compose",),
        model_types=("perception_lm",),
        features=("several images",),
    )
    register(
        "generic",
        "vismem_backbones.generic:Generic",
        description="Any other image-text-to-text model of transformers whose parts can be found out",
        families=("others, as far as docs/model_types.md says",),
        features=("several images",),
        fallback=True,
    )
