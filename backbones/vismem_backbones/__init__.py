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
