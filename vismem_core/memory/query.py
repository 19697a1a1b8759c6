"""The interface of query builders: what was seen and written becomes a query for memory (Eq. 5, 9-11)."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from vismem_core.config import QueryConfig

Ahead = tuple[Tensor, ...]


class QueryBuilder(nn.Module, ABC):
    """H = [v_1..v_y, h_1..h_z] -> Q.

    Args:
        width: d, the language model's width.
        config: its settings.
    """

    def __init__(self, width: int, config: QueryConfig) -> None:
        super().__init__()
        self.width, self.config = width, config

    def ahead(self, visual: Tensor, mask: Tensor) -> Ahead:
        """What can be computed of visual tokens (R, y, d) alone, once for all queries about them: each (R, ...).

        Only decoding asks for it. Without any, :meth:`forward` is called without it too.

        Args:
            mask: (R, y), False at padding.
        """
        return ()

    @abstractmethod
    def forward(self, states: Tensor, mask: Tensor, ahead: Ahead = ()) -> Tensor:
        """Build one query per row.

        Args:
            states: H (R, y + z, d) in fp32: projected visual tokens, then the last-layer hidden states from which
                the tokens of the output segment were chosen, the invocation token the last of them; each padded.
            mask: (R, y + z), False at padding.
            ahead: what :meth:`ahead` gave for the visual tokens. It changes nothing but the time that it takes.

        Returns:
            Q (R, K, d) in fp32.
        """
