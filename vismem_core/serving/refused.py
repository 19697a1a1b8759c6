"""What a request may come to, and the errors by which others are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vismem_core.errors import VismemError

KINDS = {429: "rate_limit_error"}
"""What OpenAI calls errors of some status; the other ones of 4xx are ``invalid_request_error``."""


class RefusedError(VismemError):
    """A request that gets no answer.

    Args:
        status: of HTTP.
        field: of the request, where one is at fault.
        code: a name for programs.
    """

    def __init__(self, message: str, status: int = 400, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field, self.code = status, field, code

    def to_dict(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many there may be.

    Attributes:
        body: bytes of a request, and of an image that is fetched.
        images: of a request.
        pixels: of an image.
        characters: of all texts of a request.
        tokens: of an answer.
        copies: answers to one request (``n``).
        requests: at once, waiting ones included.
        seconds: from a request's arrival to the end of its answer.
    """

    body: int = 20_000_000
    images: int = 8
    pixels: int = 16_000_000
    characters: int = 400_000
    tokens: int = 1024
    copies: int = 16
    requests: int = 128
    seconds: float = 300.0
