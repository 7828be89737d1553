"""What a page shows for an exported function or class: signature, docstring, table of arguments.

nbdev's own renderer writes the argument comments ("docments") into the signature; here they make
the table that readers look for, taken from the module that is committed.
"""

from __future__ import annotations

import inspect
import re
from types import ModuleType

from fastcore.docments import docments

MAX_SIGNATURE = 88


def anchor(name: str) -> str:
    """The id of a symbol's heading: its name, since `Copying` and `copying` can both exist."""
    return name


def public_methods(cls: type) -> dict[str, object]:
    """The methods that a class itself defines and describes, by name."""
    found = {}
    for name, value in vars(cls).items():
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if inspect.isfunction(function) and not name.startswith("_") and function.__doc__:
            found[name] = function
    return found


def documented(module: ModuleType, name: str) -> bool:
    """Whether the page of `module` has a heading for `name`, a function, class or Class.method."""
    owner, _, method = name.partition(".")
    value = getattr(module, owner, None)
    if method:
        return inspect.isclass(value) and method in public_methods(value)
    return inspect.isclass(value) or inspect.isfunction(value)


def type_text(annotation: object) -> str:
    """An annotation as a reader would write it."""
    if annotation is inspect.Parameter.empty:
        return ""
    if isinstance(annotation, str):
        return annotation.strip("\"'")
    return inspect.formatannotation(annotation)


def default_text(value: object) -> str:
    """A default value as a reader would write it."""
    if value is inspect.Parameter.empty:
        return ""
    if inspect.isfunction(value) or inspect.isclass(value):
        return value.__name__
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def signature_of(symbol: object) -> inspect.Signature | None:
    """The signature without `self` or `cls`, or None where Python knows none."""
    try:
        signature = inspect.signature(symbol)
    except (ValueError, TypeError):
        return None
    kept = [p for name, p in signature.parameters.items() if name not in ("self", "cls")]
    return signature.replace(parameters=kept)


def parameter_text(parameter: inspect.Parameter) -> str:
    """One parameter: `name: type = default`."""
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind, default = type_text(parameter.annotation), default_text(parameter.default)
    text = stars + parameter.name + (f": {kind}" if kind else "")
    if not default:
        return text
    return f"{text} = {default}" if kind else f"{text}={default}"


def signature_text(name: str, symbol: object) -> str:
    """The call, on one line where it fits and else with one parameter a line."""
    signature = signature_of(symbol)
    if signature is None:
        return name
    parameters = list(signature.parameters.values())
    parts, starred = [], False
    for parameter in parameters:
        starred |= parameter.kind is parameter.VAR_POSITIONAL
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts, starred = [*parts, "*"], True
        parts.append(parameter_text(parameter))
    returns = "" if inspect.isclass(symbol) else type_text(signature.return_annotation)
    tail = f") -> {returns}" if returns else ")"
    line = f"{name}({', '.join(parts)}{tail}"
    if len(line) <= MAX_SIGNATURE:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + tail


def code(text: str, *, link: bool = False) -> str:
    """Text as code inside a table cell; with `link`, nbdev may link it to its definition.

    A bare `|` would end the cell, a `$` begin a formula, and the renderers disagree on how to
    escape them in backticks.
    """
    if link and text and not re.search(r"[|`]", text):
        return f"`{text}`"
    escaped = re.sub(r"[&<|'\"$*_`\[\\]", lambda match: f"&#{ord(match.group())};", text)
    return f"<code>{escaped}</code>" if text else ""


def details(text: str | None) -> str:
    """An argument's comment as a table cell: one line, no bare `|`."""
    line = " ".join((text or "").split())
    line = re.sub(r"`([^`]*\|[^`]*)`", lambda match: code(match.group(1)), line)
    return line.replace("|", "&#124;")


def argument_table(symbol: object) -> str:
    """The arguments and what comes back, as a table; "" where the signature says it all."""
    signature = signature_of(symbol)
    if signature is None:
        return ""
    comments = docments(symbol, args_kwargs=True)
    rows = [
        (
            code(name),
            code(type_text(parameter.annotation), link=True),
            code(default_text(parameter.default), link=True),
            comments.get(name),
        )
        for name, parameter in signature.parameters.items()
    ]
    returns = type_text(signature.return_annotation)
    described = rows or comments.get("return")
    if not inspect.isclass(symbol) and returns not in ("", "None") and described:
        rows.append(("**Returns**", code(returns, link=True), "", comments.get("return")))
    if not rows:
        return ""
    head = "| Argument | Type | Default | Details |\n|:---|:-----|:---|:---------|\n"
    return head + "\n".join(f"| {a} | {b} | {c} | {details(d)} |" for a, b, c, d in rows)


def describe(symbol: object, name: str, *, level: int = 3) -> str:
    """The Markdown for one symbol, and for the methods of a class below it."""
    blocks = [
        f"{'#' * level} {name} {{#{anchor(name)} .symbol}}",
        f"```python\n{signature_text(name, symbol)}\n```",
        inspect.getdoc(symbol) or "",
        argument_table(symbol),
    ]
    if inspect.isclass(symbol):
        blocks += [
            describe(method, f"{name}.{method_name}", level=level + 1)
            for method_name, method in public_methods(symbol).items()
        ]
    return "\n\n".join(block for block in blocks if block)
