"""Image dropout: now and then what follows an invocation does not see the image tokens, so that memory has to tell.

Models rely on latents where these hold what the answer needs and no shortcut around them is left (arXiv 2605.18445).

What follows an invocation is all that is fed once its memory has been formed: latents, end token, text, and later
invocation tokens. The first memory is formed before, with everything in sight. Memory formed later is formed of what is
left in the language model's cache, where its former reads that; what formers and query builders look at besides stays:
the vision encoder's states, the visual tokens in H, and with ``context="recompute"`` the whole history.
"""

from __future__ import annotations

from random import Random

from vismem_core.memory.memory import Memory


def drops_images(memory: Memory, share: float, key: str) -> bool:
    """Whether an answer drops its images: by chance, or always if the memory is set to be used so.

    Args:
        share: the chance.
        key: all chance comes from it, so that tau_rev (Eq. 8), which has the seed of its trajectory, does as it did.
    """
    return memory.config.drop_image_after_invocation or Random(f"{key}/image").random() < share
