"""What the requests of all dialects share: the rules of the operator, and how faults are found and reported.

A dialect has its own schema (`parameters`, `responses_parameters`) and its own rules for values that do not fit
together.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from broker.core.errors import InvalidRequest, ModelNotAllowed
from broker.core.messages import TAG_MARK
from broker.core.nested import Opened, without_opened
from broker.core.parameters import CLOSED_MODEL_FORMS, CLOSED_PARTS, FETCHED_IMAGES, PRESET, is_open

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from pydantic import TypeAdapter

MAX_DETAILS = 20

MAX_PARAMETERS = 500
"""Names at the top of a request. Each unknown one is compared with the operator's globs."""

# A body of a megabyte can have a hundred thousand faults, and each one costs a dictionary.
_MAX_FAULTS_READ = 1000
_SHOWN_KEY_CHARACTERS = 64
_KEY_MARK = "[key]"  # pydantic's step in a path for "the key itself, not its value"

_SENTENCES = {
    "missing": "This is needed",
    "extra_forbidden": "This is not known here",
    "string_pattern_mismatch": "Only visible ASCII characters may stand here",
    "string_unicode": "This is not valid Unicode text",
    "dict_type": "Input should be an object",
    "list_type": "Input should be an array",
}
_ALL_MODELS = ("*",)
_CLOSED = "This broker does not take this parameter"

Fault = dict[str, str]


@dataclass(frozen=True, slots=True)
class RequestRules:
    """The rules of the operator.

    Attributes:
        default_model: the model of requests that name none.
        extra_parameters: globs (case-sensitive) of parameters that are accepted in addition to those of every page: by
            their name (``plugins``, ``transforms``, ``debug`` and any unknown one); ``n``, ``modalities``,
            ``service_tier``, ``tools`` and ``tool_choice`` for values that are otherwise refused; ``:online``,
            ``:batch`` and ``@preset`` for models of that form; ``file``, ``input_audio`` and ``video_url`` for such
            parts of a message; ``image_url.http`` for pictures that an upstream other than OpenRouter would fetch; a
            dotted name such as ``messages.cache_control`` for an unknown nested key. Opened values are sent unchanged.
        allowed_models: globs (case-sensitive) of the models that a request may reach.
        max_messages: the largest number of messages, or of items of an input.
    """

    default_model: str | None
    extra_parameters: tuple[str, ...]
    allowed_models: tuple[str, ...]
    max_messages: int


class Schema(NamedTuple):
    """The parameters of a dialect.

    Attributes:
        kind: a typed dict of the parameters that every page may send.
        types: its adapter.
        opened: adapter of the opened parameters that the broker must be able to read.
        closable: parameters that every page may send with limited values; opened by name, any value is sent unchanged.
    """

    kind: Any
    types: TypeAdapter[Any]
    opened: TypeAdapter[Any]
    closable: frozenset[str]


def given_parameters(document: Any) -> dict[str, Any]:
    """Return the parameters of a request; one that is null counts as absent.

    Raises:
        InvalidRequest: the document is not an object, or has too many parameters.
    """
    if not isinstance(document, dict):
        raise InvalidRequest(details=[fault("body", "The body must be a JSON object")])
    if len(document) > MAX_PARAMETERS:
        refuse([fault("body", f"There may be at most {MAX_PARAMETERS} parameters")])
    return {name: value for name, value in document.items() if value is not None}


def take_model(given: dict[str, Any], rules: RequestRules) -> str:
    """Remove the model that is asked first from the parameters, and return it.

    Raises:
        InvalidRequest: none is named, and there is no default model.
    """
    model: str | None = given.pop("model", None) or rules.default_model
    if not model:
        raise InvalidRequest(details=[fault("model", "Name a model: this broker has no default one")])
    return model


def reachable_models(model: str, parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Return every model that may serve a request: ``model``, then those of ``models``."""
    return tuple(dict.fromkeys((model, *parameters.get("models", ()))))


def check_models(models: Iterable[str], rules: RequestRules) -> None:
    """Check that a request can reach only models that the rules allow.

    Raises:
        ModelNotAllowed: with the first model that is not allowed.
    """
    for model in models:
        if rules.allowed_models != _ALL_MODELS and not any(
            fnmatchcase(model, glob) for glob in rules.allowed_models
        ):
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
    """Return the faults in types and ranges of single parameters."""
    opened = _opened(given, schema, extra_parameters)
    checked = {name: value for name, value in given.items() if name not in opened} if opened else given
    if extra_parameters and (nested := _opened_below(extra_parameters)):
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
    """Return the faults of parts that are not open.

    Args:
        parts: place and type of each part.
        extra_parameters: the operator's globs.
    """
    return [
        fault(f"{place}.type", f"Parts of this kind are not open here ({CLOSED_PARTS[kind]})")
        for place, kind in parts
        if kind in CLOSED_PARTS and not is_open(CLOSED_PARTS[kind], extra_parameters)
    ]


def refuse_fetched_images(addresses: Iterable[tuple[str, str]], extra_parameters: tuple[str, ...]) -> None:
    """Refuse pictures that are not in the request itself, unless an operator opened them.

    This is for upstreams other than OpenRouter: such a server would fetch addresses of its own network.

    Args:
        addresses: place and address of each picture.
        extra_parameters: the operator's globs.

    Raises:
        InvalidRequest: with the place of each address, never with the address.
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


@lru_cache(maxsize=8)
def _opened_below(extra_parameters: tuple[str, ...]) -> Opened:
    """Return the nested names of an operator's list. Kept, because they are an expression to compile."""
    return Opened(extra_parameters)


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


def _forms(model: str) -> Collection[str]:
    """Return ``{":free", ":online", "@preset"}`` for ``a/b:free:Online@preset/c``."""
    if ":" not in model and "@" not in model:
        return ()
    name = model.lower()
    suffixes = name.replace(PRESET, f":{PRESET}").split(":")[1:]
    return {f":{suffix}" for suffix in suffixes} | ({PRESET} if PRESET in name else set())
