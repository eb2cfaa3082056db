"""Theory pages: glossary, compiled formulas, proofs with the evidence of a check, and labels of statements.

Everything comes from the sympy objects that the calculators are compiled from; every proof is checked while its page is
written, and a proof that fails ends the build.
"""

from __future__ import annotations

import re
from typing import Any

_SPECIAL = re.compile(r"([\\`*_\[\]<>#|])")


def theory_pages() -> dict[str, str]:
    """Pages by file name."""
    from theory.derivations import derivations, derive

    pages = {"glossary.md": glossary_page(), "formulas.md": formulas_page(), "statements.md": statements_page()}
    names = []
    for name in derivations():
        slug = name.replace(" ", "-")
        pages[f"proof-{slug}.md"] = proof_page(derive(name))
        names.append(f"proof-{slug}")
    pages["index.md"] = index_page(names)
    return pages


def index_page(proofs: list[str]) -> str:
    from docs.building.generate import toctree

    return "\n".join(
        [
            "# The theory, from its calculators",
            "",
            "These pages are written by the code that computes: the formulas are the sympy expressions from which",
            "the numeric functions are compiled, and every proof was checked when this page was built (identities",
            "by sympy or with 50 digits, inequalities at random points of their domain, statements about",
            "expectations on random finite probability spaces that are summed out). How to use the calculators is",
            "on [Bounds and predictions](../../theory.md); what is easily read too generously, on",
            "[traps](../../theory-traps.md).",
            "",
            toctree(["glossary", "formulas", "statements"]),
            "## Proofs",
            "",
            toctree(proofs),
        ]
    )


def glossary_page() -> str:
    """Every symbol: LaTeX, key, meaning, unit, domain."""
    from theory.symbols import glossary

    lines = [
        "# Symbols",
        "",
        "Units: `loss` is the unit of the risk, `param` that of a parameter; the two are kept apart, because no",
        "bound may depend on how either is scaled.",
        "",
        "| symbol | in code | meaning | unit | domain |",
        "|---|---|---|---|---|",
    ]
    for entry in glossary().values():
        lines.append(
            f"| ${entry.latex}$ | `{entry.key}` | {prose(entry.meaning)} | `{entry.unit}` | {prose(entry.domain)} |"
        )
    return "\n".join(lines) + "\n"


def formulas_page() -> str:
    """Every formula that is compiled."""
    from theory.export import formulas
    from theory.symbols import glossary

    known = glossary()
    lines = [
        "# Formulas",
        "",
        "Each of these is one sympy expression; the function that computes is compiled from it, so what is shown",
        "is what runs. `theory.formula_to_python` writes any of them as a plain function, `theory.latex_document`",
        "all of them as LaTeX.",
        "",
    ]
    for number, make in enumerate(formulas(), 1):
        formula = make()
        where = f"{make.__module__}.{make.__name__}"
        symbols = ", ".join(f"${known[key].latex}$ {prose(known[key].meaning)}" for key in formula.keys)
        lines += [
            f"## {number}. {prose(formula.source[:1].upper() + formula.source[1:])}",
            "",
            f"`{where}`, named `{formula.name}`:",
            "",
            "$$",
            formula.latex(),
            "$$",
            "",
            f"With {symbols}.",
            "",
        ]
    return "\n".join(lines)


def statements_page() -> str:
    """Which statements are attained."""
    from theory import statements

    lines = [
        "# How tight every statement is",
        "",
        "*tight*: an instance attains it; *limit*: instances come as close as one likes; *upper*: none is known,",
        "and the ratio is the largest exact/upper that was found. The instances are in `theory.statement_labels`",
        "and are recomputed by the tests.",
        "",
        "| statement | theorem | label | exact/upper | instance | how it was looked for |",
        "|---|---|---|---|---|---|",
    ]
    for row in statements():
        cells = (row.name, row.theorem, row.label, f"{row.ratio:.4g}", row.where, row.search)
        lines.append("| " + " | ".join(prose(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def proof_page(proof: Any) -> str:
    """One derivation with the evidence of a check.

    Raises:
        MergeboundError: a step fails.
    """
    import sympy

    checked = proof.check(seed=0)
    lines = [f"# {prose(proof.theorem)}", "", f"**Claim.** {prose(proof.claim)}", ""]
    lines += [f'`theory.derive("{proof.name}")`; checked with seed 0 when this page was built.', ""]
    for number, evidence in enumerate(checked, 1):
        step = evidence.step
        lines += [f"{number}. *{step.kind}.* {prose(step.statement)}", ""]
        if step.lhs is not None and step.rhs is not None:
            sign = r"\le" if step.kind == "inequality" else "="
            left = "" if step.lhs == step.rhs else f"{sympy.latex(step.lhs)} {sign} "
            lines += ["   $$", f"   {left}{sympy.latex(step.rhs)}", "   $$", ""]
        lines += [f"   Because: {prose(step.justification)}. {evidence_words(evidence)}", ""]
    return "\n".join(lines)


def evidence_words(evidence: Any) -> str:
    """What a check did, in a sentence."""
    if evidence.method == "not checked":
        return "(Not checked: a definition, an assumption or a citation.)"
    if evidence.method == "sympy":
        return "(Checked by sympy.)"
    where = {"50 digits": "points with 50 digits", "points": "random points", "instances": "random instances"}
    closest = f", largest ratio {evidence.closest:.4g}" if evidence.step.kind == "inequality" else ""
    return f"(Checked at {evidence.count} {where[evidence.method]}{closest}.)"


def prose(text: str) -> str:
    """Text for Markdown: what is between dollars stays LaTeX, the rest loses its special characters."""
    parts = str(text).split("$")
    for index in range(0, len(parts), 2):
        parts[index] = plain(parts[index]).replace("--", "–")
    return "$".join(parts)


def plain(text: str) -> str:
    """Text for Markdown that loses its special characters and nothing else."""
    return _SPECIAL.sub(r"\\\1", text)
