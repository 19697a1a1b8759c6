"""The experiments that ship: YAML files, to run by name or to copy and change (``vismem experiment my.yaml``)."""

from pathlib import Path

_FOLDER = Path(__file__).parent

main = _FOLDER / "main.yaml"
ablation = _FOLDER / "ablation.yaml"
lengths = _FOLDER / "lengths.yaml"
backbones = _FOLDER / "backbones.yaml"
forgetting = _FOLDER / "forgetting.yaml"
recall = _FOLDER / "recall.yaml"
invocation = _FOLDER / "invocation.yaml"
efficiency = _FOLDER / "efficiency.yaml"
cross_domain = _FOLDER / "cross_domain.yaml"
