"""Parse an untrusted JSON document into a valid request of any dialect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.core.chat import ChatRequest, parse_chat
from broker.core.responses import ResponsesRequest, is_responses, parse_responses

if TYPE_CHECKING:
    from broker.core.checking import RequestRules


def parse_request(document: Any, rules: RequestRules) -> ChatRequest | ResponsesRequest:
    """Return the request in this document. With `input` instead of `messages` it is a Responses request.

    Raises:
        InvalidRequest: with at most ``MAX_DETAILS`` details, which name fields and never quote values.
        ModelNotAllowed: with the first model that the rules do not allow.
    """
    return parse_responses(document, rules) if is_responses(document) else parse_chat(document, rules)
