"""What the requests of all dialects share: the rules of the operator, and how faults are found and reported.

A dialect has its own schema (`parameters`, `responses_parameters`) and rules of its own for values that do not go
together.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from broker.core.errors import InvalidRequest, ModelNotAllowed
from broker.core.messages import TAG_MARK
from broker.core.nested import Opened, without_opened
from broker.core.parameters import CLOSED_MODEL_FORMS, CLOSED_PARTS, FETCHED_IMAGES, PRESET, is_open

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

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
class RequestRules:
    """The rules of the operator.

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
        max_messages: how many messages, or items of an input, a request may hold.
    """

    default_model: str | None
    extra_parameters: tuple[str, ...]
    allowed_models: tuple[str, ...]
    max_messages: int


class Schema(NamedTuple):
    """The parameters of a dialect.

    Attributes:
        kind: a typed dict of what every page may send.
        types: its adapter.
        opened: adapter of what the broker must be able to read of opened parameters.
        closable: known to everybody in a narrow form; opened by name they are passed through as they are.
    """

    kind: Any
    types: TypeAdapter[Any]
    opened: TypeAdapter[Any]
    closable: frozenset[str]


def given_parameters(document: Any) -> dict[str, Any]:
    """Return the parameters of a request; one that is null counts as absent.

    Raises:
        InvalidRequest: the document is no object, or has too many of them.
    """
    if not isinstance(document, dict):
        raise InvalidRequest(details=[fault("body", "The body must be a JSON object")])
    if len(document) > MAX_PARAMETERS:
        refuse([fault("body", f"There may be at most {MAX_PARAMETERS} parameters")])
    return {name: value for name, value in document.items() if value is not None}


def take_model(given: dict[str, Any], rules: RequestRules) -> str:
    """Take the model that is asked first out of the parameters.

    Raises:
        InvalidRequest: none is named, and there is no default one.
    """
    model: str | None = given.pop("model", None) or rules.default_model
    if not model:
        raise InvalidRequest(details=[fault("model", "Name a model: this broker has no default one")])
    return model


def reachable_models(model: str, parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Return every model that may serve a request: ``model``, then the rest of ``models``."""
    return tuple(dict.fromkeys((model, *parameters.get("models", ()))))


def check_models(models: Iterable[str], rules: RequestRules) -> None:
    """Check that a request can reach only models that the rules allow.

    Raises:
        ModelNotAllowed: naming the first that they do not.
    """
    for model in models:
        if not any(fnmatchcase(model, glob) for glob in rules.allowed_models):
            raise ModelNotAllowed(f"The model {model} may not be used here.")


def refuse(faults: list[Fault]) -> None:
    """Raise `InvalidRequest` where there are faults, with at most `MAX_DETAILS` of them."""
    if faults:
        raise InvalidRequest(details=faults[:MAX_DETAILS])


def fault(field: str, sentence: str) -> Fault:
    """Return a detail of a 422."""
    return {"field": field, "message": f"{sentence}."}


def too_many(given: Mapping[str, Any], field: str, limit: int) -> list[Fault]:
    """Return what is wrong with the length of a list. Anything but a list is ignored."""
    value = given.get(field)
    if not isinstance(value, list) or len(value) <= limit:
        return []
    return [fault(field, f"There may be at most {limit} {'messages' if field == 'messages' else 'items'}")]


def wrong_parameters(given: dict[str, Any], schema: Schema, extra_parameters: tuple[str, ...]) -> list[Fault]:
    """Return what is wrong with the types and ranges of parameters, each by itself."""
    opened = _opened(given, schema, extra_parameters)
    checked = {name: value for name, value in given.items() if name not in opened}
    if nested := Opened(extra_parameters):
        checked = without_opened(checked, schema.kind, nested)
    if not opened:
        return _faults(schema.types, checked)
    return [
        *_faults(schema.types, checked),
        *_faults(schema.opened, {name: given[name] for name in opened}),
    ]


def wrong_models(given: Mapping[str, Any], extra_parameters: tuple[str, ...]) -> list[Fault]:
    """Return the models whose names have a form that is not open. The parameters must be valid."""
    return [
        fault(field, CLOSED_MODEL_FORMS[form])
        for field, form in _model_forms(given)
        if not is_open(form, extra_parameters)
    ]


def wrong_parts(parts: Iterable[tuple[str, str]], extra_parameters: tuple[str, ...]) -> list[Fault]:
    """Return the parts that are not open.

    Args:
        parts: place and type of each.
        extra_parameters: the operator's globs.
    """
    return [
        fault(f"{place}.type", f"Parts of this kind are not open here ({CLOSED_PARTS[kind]})")
        for place, kind in parts
        if kind in CLOSED_PARTS and not is_open(CLOSED_PARTS[kind], extra_parameters)
    ]


def refuse_fetched_images(addresses: Iterable[tuple[str, str]], extra_parameters: tuple[str, ...]) -> None:
    """Refuse pictures that are not in the request itself, unless an operator opened them.

    For an upstream other than OpenRouter: a server of one's own would fetch them from addresses of its own network.

    Args:
        addresses: place and address of each picture.
        extra_parameters: the operator's globs.

    Raises:
        InvalidRequest: naming each address, never quoting it.
    """
    if is_open(FETCHED_IMAGES, extra_parameters):
        return
    refuse(
        [
            fault(field, "Pictures must be data: URLs here")
            for field, address in addresses
            if address[:5].lower() != "data:"
        ]
    )


def _opened(given: Mapping[str, Any], schema: Schema, extra_parameters: tuple[str, ...]) -> frozenset[str]:
    """Return the given parameters that are not checked because the operator opened them."""
    if not extra_parameters:
        return frozenset()
    always_checked = schema.kind.__annotations__.keys() - schema.closable
    return frozenset(name for name in given.keys() - always_checked if is_open(name, extra_parameters))


def _faults(types: TypeAdapter[Any], values: dict[str, Any]) -> list[Fault]:
    try:
        types.validate_python(values)
    except ValidationError as error:
        if error.error_count() > _MAX_FAULTS_READ:
            return [fault("body", f"There are {error.error_count()} faults in this request")]
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        return [
            fault(_field(found["loc"]), _sentence(found["type"], found["loc"], found["msg"]))
            for found in faults
        ]
    return []


def _field(path: tuple[int | str, ...]) -> str:
    """Return the path of a value in the document, such as ``messages.3.content.1.image_url.url``."""
    steps = (str(step)[:_SHOWN_KEY_CHARACTERS] for step in path if not _is_mark(step))
    return ".".join(steps) or "body"


def _is_mark(step: int | str) -> bool:
    return isinstance(step, str) and (step.startswith(TAG_MARK) or step == _KEY_MARK)


def _sentence(kind: str, path: tuple[int | str, ...], default: str) -> str:
    if kind == "extra_forbidden" and len(path) == 1:
        return _CLOSED
    return _SENTENCES.get(kind, default)


def _model_forms(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the field and the form of each model whose name has a special form."""
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
