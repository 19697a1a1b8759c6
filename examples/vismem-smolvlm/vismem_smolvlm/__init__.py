"""SmolVLM and Idefics3 for vismem. This module only names things, so that ``vismem --help`` stays fast."""

from vismem_core.hookspecs import Register, hookimpl

VISMEM_API = 4


@hookimpl
def register_backbones(register: Register) -> None:
    register(
        "smolvlm",
        "vismem_smolvlm.backbone:SmolVLM",
        description="SmolVLM, SmolVLM2 and Idefics3",
        families=("SmolVLM", "SmolVLM2", "Idefics3"),
        model_types=("idefics3", "smolvlm"),
        features=("several images", "tiles"),
    )


@hookimpl
def register_bases(register: Register) -> None:
    register("smolvlm", "vismem_smolvlm.base:tiny", description="random weights, to try the package with")
