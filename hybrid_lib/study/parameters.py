"""A notebook's parameters, checked before anything is computed."""

import ast
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pydantic

from hybrid_lib.training.experiments import did_you_mean, error_messages

INJECTED = "# Parameters\n"  # the first line of papermill's cell
TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def checked(namespace: dict, check: Callable[[SimpleNamespace], Any]) -> SimpleNamespace:
    """Check a notebook's parameters; the cell after them calls this with ``globals()``.

    The cell tagged ``parameters`` declares names and types (``epochs: int = 3``; a default of None
    means that the value may be missing). Papermill injects a cell after it, only warns of unknown
    names, and passes values on unconverted, as text or numbers.

    Args:
        namespace: the notebook's globals, including IPython's list of cells ``In``.
        check: called with the values; raises ValueError if they are impossible.

    Returns:
        The values as attributes, converted to their types; ``plan`` holds the result of ``check``.

    One ValueError lists every fault: undeclared names, values of wrong types, what ``check`` found.
    """
    cells = [(source, _statements(source)) for source in namespace["In"]]
    injected = [node for source, body in cells if source.startswith(INJECTED) for node in body]
    if not all(isinstance(node, ast.Assign) for node in injected):  # papermill does not quote names
        raise ValueError("papermill's cell contains code, not only values: give declared names")
    given = [ast.unparse(target) for node in injected for target in node.targets]
    declared = next(filter(None, (_declared(body) for _, body in cells)), {})
    if not declared:
        raise ValueError("no cell declares parameters with types, as in seeds: str = '0-2'")
    messages = [f"{name} is not a parameter of this notebook{did_you_mean(name, declared)}"
                for name in given if name not in declared]  # fmt: skip
    # Papermill turns the text 0 into a number, even where text is declared.
    config = pydantic.ConfigDict(coerce_numbers_to_str=True)
    model = pydantic.create_model("Parameters", __config__=config, **declared)
    try:
        values = SimpleNamespace(**dict(model(**{name: namespace[name] for name in declared})))
        values.plan = check(values)
    except ValueError as error:
        messages.append(reason(error))
    if messages:
        raise ValueError(f"{'; '.join(messages)} (parameters: {', '.join(declared)})") from None
    return values


def _statements(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError:  # a cell with shell commands, say
        return []


def _declared(body: list[ast.stmt]) -> dict[str, tuple]:
    """Names and types, in pydantic's form, if a cell only declares parameters; else {}."""
    found = {}
    for node in body:
        kind = TYPES.get(ast.unparse(node.annotation)) if isinstance(node, ast.AnnAssign) else None
        if kind is None or node.value is None:
            return {}
        found[ast.unparse(node.target)] = (
            kind | None if ast.unparse(node.value) == "None" else kind,
            ...,
        )
    return found


def reason(error: Exception) -> str:
    """The message of an exception, on one line."""
    messages = error_messages(error) if isinstance(error, pydantic.ValidationError) else [error]
    return " ".join("; ".join(map(str, messages)).split())


def seed_list(text: str) -> list[int]:
    """Parse seeds, single ones and ranges.

    >>> seed_list("0-2,7")
    [0, 1, 2, 7]
    """
    try:
        ends = [tuple(map(int, part.split("-"))) for part in text.split(",")]
        if any(len(pair) > 2 or pair[0] > pair[-1] for pair in ends):
            raise ValueError
    except ValueError:
        raise ValueError(f"seeds={text!r}: give numbers, as in 0,3 or 0-4") from None
    return [seed for pair in ends for seed in range(pair[0], pair[-1] + 1)]
