"""The configuration files of accelerate are ones that it takes and that training supports."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

FILES = sorted((Path(__file__).parents[2] / "examples" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda own: own.stem)
def test_accelerate_reads_it(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert {"one": ("NO", 1), "ddp": ("MULTI_GPU", 2)}[file.stem] == (
        config.distributed_type,
        config.num_processes,
    )
    assert config.mixed_precision == "no"
    assert f"--config_file examples/accelerate/{file.name} -m vismem_cli train" in file.read_text(encoding="utf-8")
