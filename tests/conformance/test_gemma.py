"""The public suite on Gemma 3, 3n, 4 and PaliGemma: windows shorter than prompts, shared keys, tied and untied."""

from typing import Any

import pytest
from model_types import ROPE, build, text

from vismem_core.testing import BackboneContract

KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
WIDE = {2: {"head_dim": 16, "num_key_value_heads": 1}}
"""Heads of the larger models' layers without windows."""


class TestGemma3(BackboneContract):
    """Windows of 8 tokens."""

    backbone = "gemma3"

    def load(self) -> tuple[Any, Any]:
        return build("gemma3")


@pytest.mark.long
class TestGemma3Untied(TestGemma3):
    """One key for all heads, windows of 5 tokens, stretched positions as from 4B on, scores scaled as in 27B."""

    def load(self) -> tuple[Any, Any]:
        rope = {"sliding_attention": ROPE, "full_attention": ROPE | {"rope_type": "linear", "factor": 8.0}}
        settings = text(num_hidden_layers=3, layer_types=KINDS, num_key_value_heads=1, sliding_window=5,
                        query_pre_attn_scalar=5, rope_parameters=rope, tie_word_embeddings=False)  # fmt: skip
        return build("gemma3", **settings, tie_word_embeddings=False)


@pytest.mark.long
class TestGemma4(BackboneContract):
    """As E2B and E4B: inputs for each layer, and the last layers read keys of earlier ones."""

    backbone = "gemma4"

    def load(self) -> tuple[Any, Any]:
        return build("gemma4", **text(use_double_wide_mlp=True))


@pytest.mark.long
class TestGemma4Untied(TestGemma4):
    """The same, untied; one key for all heads, windows of 5 tokens, images that see themselves both ways."""

    def load(self) -> tuple[Any, Any]:
        settings = text(num_key_value_heads=1, sliding_window=5, use_bidirectional_attention="vision",
                        tie_word_embeddings=False)  # fmt: skip
        return build("gemma4", **settings, tie_word_embeddings=False)


@pytest.mark.long
class TestGemma4Dense(TestGemma4):
    """As 31B: no inputs for layers, keys that are values where there is no window."""

    def load(self) -> tuple[Any, Any]:
        return build("gemma4", **text(hidden_size_per_layer_input=0, num_kv_shared_layers=0, num_hidden_layers=3,
            layer_types=KINDS, per_layer_config=WIDE, attention_k_eq_v=True,
            use_bidirectional_attention="vision"))  # fmt: skip


@pytest.mark.long
class TestGemma4Experts(TestGemma4):
    """As 26B-A4B: two of four experts beside each layer's own network."""

    def load(self) -> tuple[Any, Any]:
        return build("gemma4", **text(hidden_size_per_layer_input=0, num_kv_shared_layers=0, num_hidden_layers=3,
            layer_types=KINDS, per_layer_config=WIDE, attention_k_eq_v=True, use_bidirectional_attention="vision",
            enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16))  # fmt: skip


@pytest.mark.long
class TestGemma3n(BackboneContract):
    backbone = "gemma3n"

    def load(self) -> tuple[Any, Any]:
        return build("gemma3n")


@pytest.mark.long
class TestPaliGemma(BackboneContract):
    backbone = "paligemma"

    def load(self) -> tuple[Any, Any]:
        return build("paligemma")


@pytest.mark.long
class TestPaliGemma2(TestPaliGemma):
    """A language model with windows, which its outer forward does not know how to hand masks for."""

    def load(self) -> tuple[Any, Any]:
        return build("paligemma", **text(model_type="gemma2", sliding_window=8, query_pre_attn_scalar=8, head_dim=8,
            layer_types=["sliding_attention", "full_attention"], attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0))  # fmt: skip
