"""A chat request, from an untrusted JSON document to a value that the rest can rely on."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from broker.core.errors import InvalidRequest, ModelNotAllowed
from broker.core.messages import TAG_MARK, image_addresses, part_types, stray_tool_messages
from broker.core.nested import Opened, without_opened
from broker.core.parameters import (
    CLOSED_MODEL_FORMS,
    CLOSED_PARTS,
    FETCHED_IMAGES,
    OPENED_PARAMETERS,
    PARAMETERS,
    PRESET,
    Parameters,
    is_open,
    opened_parameters,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic import TypeAdapter

MAX_DETAILS = 20

MAX_PARAMETERS = 500
"""Names at the top of a request. Each that we do not know is compared with the operator's globs."""

# A body of a megabyte can hold a hundred thousand faults; each one costs a dictionary.
_MAX_FAULTS_READ = 1000
_SHOWN_KEY_CHARACTERS = 64
_KEY_MARK = "[key]"  # pydantic's word in a path for "the key itself, not its value"

_SENTENCES = {
    "missing": "This is needed",
    "extra_forbidden": "This is not known here",
    "string_pattern_mismatch": "Only visible ASCII characters may stand here",
    "string_unicode": "This is not valid Unicode text",
    "dict_type": "Input should be an object",
    "list_type": "Input should be an array",
}
_CLOSED = "This broker does not take this parameter"

Fault = dict[str, str]


@dataclass(frozen=True, slots=True)
class ChatRules:
    """What an operator allows.

    Attributes:
        default_model: for requests that name none.
        extra_parameters: globs (case-sensitive) of parameters that are taken beyond those every page may send:
            by their own name (``plugins``, ``transforms``, ``debug`` and any that we do not know); ``n``,
            ``modalities``, ``service_tier``, ``tools`` and ``tool_choice`` for those values of theirs that are
            otherwise refused; ``:online``, ``:batch`` and ``@preset`` for models of that form; ``file``,
            ``input_audio`` and ``video_url`` for such parts of a message; ``image_url.http`` for pictures that an
            upstream other than OpenRouter would fetch; a dotted name such as ``messages.cache_control`` for a
            nested key that we do not know. What is opened goes upstream as it came.
        allowed_models: globs (case-sensitive) of the models that a request may reach.
        max_messages: how many messages a request may hold.
    """

    default_model: str | None
    extra_parameters: tuple[str, ...]
    allowed_models: tuple[str, ...]
    max_messages: int


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A valid request. It shares its parts with the document it was made of; nobody changes either.

    Attributes:
        model: the one that is asked first.
        messages: as they came, at least one.
        parameters: everything else that goes upstream, as it came; no value is null.
    """

    model: str
    messages: list[dict[str, Any]]
    parameters: dict[str, Any]

    @property
    def reachable_models(self) -> tuple[str, ...]:
        """Every model that may serve this request: ``model``, then the rest of ``models``."""
        return tuple(dict.fromkeys((self.model, *self.parameters.get("models", ()))))


def parse_chat(document: Any, rules: ChatRules) -> ChatRequest:
    """The chat request in this document.

    Raises:
        InvalidRequest: with at most ``MAX_DETAILS`` details, which name fields and never quote values.
        ModelNotAllowed: naming the first model that the rules do not allow.
    """
    if not isinstance(document, dict):
        raise InvalidRequest(details=[_fault("body", "The body must be a JSON object")])
    given = {name: value for name, value in document.items() if value is not None}
    _refuse(_too_many_parameters(document))
    _refuse(_too_many_messages(given, rules.max_messages))
    _refuse(_wrong_parameters(given, rules.extra_parameters))
    _refuse(_wrong_together(given, rules.extra_parameters))
    first_model = given.pop("model", None) or rules.default_model
    if not first_model:
        raise InvalidRequest(details=[_fault("model", "Name a model: this broker has no default one")])
    request = ChatRequest(model=first_model, messages=given.pop("messages"), parameters=given)
    for model in request.reachable_models:
        if not any(fnmatchcase(model, glob) for glob in rules.allowed_models):
            raise ModelNotAllowed(f"The model {model} may not be used here.")
    return request


def refuse_fetched_images(request: ChatRequest, extra_parameters: tuple[str, ...]) -> None:
    """Refuse pictures that are not in the request itself, unless an operator opened them.

    For an upstream other than OpenRouter: a server of one's own would fetch them from addresses of its own network.

    Raises:
        InvalidRequest: naming each address, never quoting it.
    """
    if is_open(FETCHED_IMAGES, extra_parameters):
        return
    _refuse(
        [
            _fault(field, "Pictures must be data: URLs here")
            for field, address in image_addresses(request.messages)
            if address[:5].lower() != "data:"
        ]
    )


def _refuse(faults: list[Fault]) -> None:
    if faults:
        raise InvalidRequest(details=faults[:MAX_DETAILS])


def _fault(field: str, sentence: str) -> Fault:
    return {"field": field, "message": f"{sentence}."}


def _too_many_parameters(document: Mapping[str, Any]) -> list[Fault]:
    if len(document) > MAX_PARAMETERS:
        return [_fault("body", f"There may be at most {MAX_PARAMETERS} parameters")]
    return []


def _too_many_messages(given: Mapping[str, Any], limit: int) -> list[Fault]:
    messages = given.get("messages")
    if isinstance(messages, list) and len(messages) > limit:
        return [_fault("messages", f"There may be at most {limit} messages")]
    return []


def _wrong_parameters(given: dict[str, Any], extra_parameters: tuple[str, ...]) -> list[Fault]:
    opened = opened_parameters(given, extra_parameters)
    checked = {name: value for name, value in given.items() if name not in opened}
    if nested := Opened(extra_parameters):
        checked = without_opened(checked, Parameters, nested)
    if not opened:
        return _faults(PARAMETERS, checked)
    return [
        *_faults(PARAMETERS, checked),
        *_faults(OPENED_PARAMETERS, {name: given[name] for name in opened}),
    ]


def _faults(types: TypeAdapter[Any], values: dict[str, Any]) -> list[Fault]:
    try:
        types.validate_python(values)
    except ValidationError as error:
        if error.error_count() > _MAX_FAULTS_READ:
            return [_fault("body", f"There are {error.error_count()} faults in this request")]
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        return [
            _fault(_field(fault["loc"]), _sentence(fault["type"], fault["loc"], fault["msg"]))
            for fault in faults
        ]
    return []


def _field(path: tuple[int | str, ...]) -> str:
    """The path of a value in the document, as in ``messages.3.content.1.image_url.url``."""
    steps = (str(step)[:_SHOWN_KEY_CHARACTERS] for step in path if not _is_mark(step))
    return ".".join(steps) or "body"


def _is_mark(step: int | str) -> bool:
    return isinstance(step, str) and (step.startswith(TAG_MARK) or step == _KEY_MARK)


def _sentence(kind: str, path: tuple[int | str, ...], default: str) -> str:
    if kind == "extra_forbidden" and len(path) == 1:
        return _CLOSED
    return _SENTENCES.get(kind, default)


def _wrong_together(given: Mapping[str, Any], extra_parameters: tuple[str, ...]) -> list[Fault]:
    """What is wrong though each value has the right type."""
    faults = [
        _fault(
            f"messages.{index}.tool_call_id", "This answers no tool call of the assistant message before it"
        )
        for index in stray_tool_messages(given["messages"])
    ]
    faults.extend(
        _fault(field, CLOSED_MODEL_FORMS[form])
        for field, form in _model_forms(given)
        if not is_open(form, extra_parameters)
    )
    faults.extend(
        _fault(f"{place}.type", f"Parts of this kind are not open here ({CLOSED_PARTS[kind]})")
        for place, kind in part_types(given["messages"])
        if kind in CLOSED_PARTS and not is_open(CLOSED_PARTS[kind], extra_parameters)
    )
    effort = (given.get("reasoning") or {}).get("effort")
    if effort is not None and given.get("reasoning_effort", effort) != effort:
        faults.append(_fault("reasoning_effort", "This contradicts reasoning.effort"))
    return faults


def _model_forms(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The field of each model that is named in a form of its own, and the form."""
    named = [("model", given.get("model", ""))]
    named.extend((f"models.{index}", model) for index, model in enumerate(given.get("models", ())))
    for field, model in named:
        present = _forms(model)
        yield from ((field, form) for form in CLOSED_MODEL_FORMS if form in present)


def _forms(model: str) -> set[str]:
    """``{":free", ":online", "@preset"}`` of ``a/b:free:Online@preset/c``."""
    name = model.lower()
    suffixes = name.replace(PRESET, f":{PRESET}").split(":")[1:]
    return {f":{suffix}" for suffix in suffixes} | ({PRESET} if PRESET in name else set())
