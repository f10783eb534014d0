"""A request that is not answered, in OpenAI's words for it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tiny_qmoe_mlx import terminal

KINDS = {401: "authentication_error", 403: "permission_error"}


class Refused(Exception):
    """What should be and what was received, and the HTTP status that says so.

    code: OpenAI's where it has one (model_not_found, context_length_exceeded, ...); headers: more of them, as
    Retry-After.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] = MappingProxyType({})
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "code"}}."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "code": self.code}}


def reason(error: BaseException) -> str:
    """An error as one line of at most 300 characters."""
    return terminal.sentence(error)[:300]
