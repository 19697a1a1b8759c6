"""Settings: frozen dataclasses, reading and merging them."""

from .schema import (
    KINDS,
    Config,
    FormerConfig,
    GrpoConfig,
    Kind,
    MemoryConfig,
    PolicyConfig,
    PolicyStageConfig,
    QueryConfig,
    StageConfig,
    TrainConfig,
    from_dict,
    load,
    to_dict,
)

__all__ = [
    "KINDS",
    "Config",
    "FormerConfig",
    "GrpoConfig",
    "Kind",
    "MemoryConfig",
    "PolicyConfig",
    "PolicyStageConfig",
    "QueryConfig",
    "StageConfig",
    "TrainConfig",
    "from_dict",
    "load",
    "to_dict",
]
