"""The page of merging methods: what each does, promises and means for the bound, from the registry and the theory."""

from __future__ import annotations

import re
from typing import Any

from docs.building.theory_pages import plain, prose


def method_pages() -> dict[str, str]:
    """Pages by file name."""
    from merging.registry import builtin_methods

    found = builtin_methods()
    flags = (
        "linear",
        "elementwise",
        "tensorwise",
        "idempotent",
        "lipschitz",
        "deterministic",
        "needs data",
        "without base",
    )
    lines = [
        "# Merging methods",
        "",
        "Made from the registry. A tick is a promise that `tests/conformance` enforces, and a missing one is",
        "enforced too: there is a counterexample. *Lipschitz* is what generalization bounds need: a small change",
        "of the experts changes the merge by at most a constant times as much. *Without base*: with its default",
        "settings the method merges experts whose base is not at hand. Settings, file handling and where tools",
        "depart from the papers: [Merging checkpoints](../../merging.md).",
        "",
        "````{container} ticks",
        "| method | what it does | " + " | ".join(flags) + " | source |",
        "|---" * (len(flags) + 3) + "|",
    ]
    for method in found.values():
        held = [*properties(method), *without_base(method)]
        ticks = " | ".join("✓" if flag in held else "" for flag in flags)
        lines.append(
            f"| [`{method.name}`](#{anchor(method)}) | {plain(method.summary)} | {ticks} | {linked(method.paper)} |"
        )
    lines += ["````", ""]
    for method in found.values():
        lines += section(method)
    return {"index.md": "\n".join(lines)}


def section(method: Any) -> list[str]:
    """One method: citation, settings, what it means for the bound, a command."""
    from experiments.commands.methods import documentation, example
    from merging.config_values import shown

    lines = [f"## `{method.name}`", "", f"{plain(sentence(method.summary))} Source: {linked(method.paper)}.", ""]
    lines += ["```text", documentation(method), "```", ""]
    if method.parameters:
        lines += ["| setting | default | domain | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{p.name}` | `{shown(p.default)}` | {prose(p.domain)} | {prose(p.meaning)} |" for p in method.parameters
        ]
        lines.append("")
    words = {"none": "does not take", "optional": "takes", "required": "requires"}[method.coefficients]
    lines += [f"It {words} coefficients per expert. Declared: {', '.join(properties(method)) or 'nothing'}.", ""]
    lines += ["What it means for the bound:", "", "```text", reading(method.name), "```", ""]
    lines += ["```text", example(method), "```", ""]
    return lines


def reading(name: str) -> str:
    """The theory's account of a method."""
    from theory import explain_method
    from theory.errors import MergeboundError

    try:
        return str(explain_method(name))
    except MergeboundError as error:
        return f"no account: {error}"


def properties(method: Any) -> list[str]:
    from experiments.commands.methods import properties as declared

    return declared(method)


def without_base(method: Any) -> tuple[str, ...]:
    """The mark of a method whose merged model does not depend on the base, with its default settings."""
    free = method.base_free({p.name: p.default for p in method.parameters})
    return ("without base",) if free else ()


def anchor(method: Any) -> str:
    """The anchor that MyST gives to the method's heading."""
    return str(method.name).lower()


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def linked(paper: str) -> str:
    """A citation with a link where it names an arXiv number or a DOI."""
    text = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    text = re.sub(r"doi:(10\.\S+)", r"[doi:\1](https://doi.org/\1)", text)
    return re.sub(r"(?<![(\w])(https://\S+)", r"<\1>", text) if "](" not in text else text
