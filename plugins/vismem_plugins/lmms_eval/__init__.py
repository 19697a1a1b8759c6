"""Models with memory in lmms-eval: ``lmms-eval --model vismem``, found through its entry points ``lmms_eval.models``.

Only lmms-eval imports what is in here; this module, which it imports for any model, brings nothing heavy.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval is told of: the model for tasks of messages, and with ``--force_simple`` the one for contexts."""
    from lmms_eval.models.registry_v2 import ModelManifest

    home = f"{__name__}.model"
    return ModelManifest(model_id="vismem", chat_class_path=f"{home}.Chat", simple_class_path=f"{home}.Simple")
