"""Pages of the programming interface: modules of the three packages, rendered from their docstrings."""

from __future__ import annotations

import importlib

PACKAGES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "theory": (
        ("Recipes and bounds", ("recipe", "schedules", "bound", "assumptions", "risk", "master", "generalization")),
        ("Terms of the bound", ("clocks", "stability", "drift", "dispersion", "training", "heads", "laws", "lemma")),
        ("Predictions", (
            "function_space", "interpolation", "per_layer", "linearization_error", "certificate", "curvature",
            "surfaces",
        )),
        ("Questions", ("what_if", "subsets", "resampling", "scaling", "scaling_law", "inverse_design", "unknown")),
        ("Merging operators, networks", ("operators", "sensitivity", "smoothness", "network", "enclosure")),
        ("Exact ground truth", ("quadratic", "regression", "one_pass", "fixed_inputs", "logistic", "simulation")),
        ("Published bounds", ("published", "published.common", "side_by_side", "comparison")),
        ("Formulas, proofs, exports", (
            "symbols", "symbolic", "elasticity", "derivations", "statement_labels", "tightness", "export", "errors",
        )),
    ),
    "merging": (
        ("Merging", ("merge", "many", "settings", "method", "registry", "partition", "keys", "layers", "tied")),
        ("Checkpoints", (
            "checkpoint", "save", "lora", "remote", "config", "mergekit_config", "statistics", "flat", "types",
            "errors",
        )),
        ("Before and after", (
            "compatible", "geometry", "alignment", "permutations", "barrier", "batchnorm", "variances", "repair",
        )),
        ("Sensitivity", ("sensitivity",)),
    ),
    "experiments": (
        ("Predictions of checkpoints", ("predict", "recipe_file", "bounds", "merge_job")),
        ("Advice", (
            "advise.merging", "advise.merge_advice", "advise.collecting", "advise.making", "advise.training",
            "advise.pilot_spec",
            "advise.compare", "advise.compare_spec", "advise.numbers",
        )),
        ("Studies", (
            "studies.hyperparameters.run", "studies.hyperparameters.spec", "studies.hyperparameters.trends",
            "studies.hyperparameters.grids", "studies.scale.runner", "studies.scale.spec", "studies.scale.findings",
            "studies.scale.checks", "studies.scale.verdicts", "studies.scale.over_tasks", "studies.scale.laws",
            "studies.scale.account", "studies.scale.theory_says", "studies.engine",
        )),
        ("The prediction study", (
            "prediction.runner", "prediction.spec", "prediction.judged", "prediction.compare", "prediction.tables",
            "prediction.aims",
        )),
        ("The validation run", ("demo", "spec", "validation")),
        ("Tasks, models, bases", (
            "tasks", "tasks.named", "tasks.images", "models", "models.families", "models.parts",
            "models.form", "models.norms", "models.extraction", "bases.base",
        )),
        ("Pretraining", ("bases.pretraining", "bases.training")),
        ("Fine-tuning", ("finetune.task_expert", "finetune.reference", "inputs.resident", "inputs.shares")),
        ("Grids", (
            "grid.spec", "grid.expand", "grid.yaml_source", "grid.estimate", "engines.prepare", "engines.local",
            "engines.ray", "store",
        )),
        ("Merges of a grid", ("combine.api", "combine.designs", "combine.effects", "combine.recipe")),
        ("Evaluation", ("evaluate.evaluate", "evaluate.results", "evaluate.transfer", "evaluate.normalised")),
        ("Measuring", (
            "measure.subject", "measure.opening", "measure.predictors", "measure.function_space",
            "measure.curvature.report", "measure.noise.constants", "measure.noise.expert_constants",
            "measure.noise.drift", "measure.noise.bounds", "measure.noise.report", "measure.twins.study",
            "measure.landscape.lines", "measure.landscape.planes", "measure.landscape.flatness",
            "measure.verdicts.report", "measure.verdicts.result",
        )),
        ("Statistics that methods need", ("measure.fisher", "measure.grams", "measure.entropy", "measure.layerwise")),
        ("Reports", ("page", "plots", "statistics")),
    ),
}  # fmt: skip
"""Modules by package and heading."""

_ABOUT = {
    "theory": "What the mathematics says. numpy, scipy and sympy; never torch.",
    "merging": "What happens to checkpoints. torch and safetensors; never `experiments`.",
    "experiments": "What is run and measured; owns the command line.",
}


def api_pages() -> dict[str, str]:
    """Pages by file name: one per module, one per package, one for all."""
    from docs.building.generate import toctree

    pages = {}
    for package, groups in PACKAGES.items():
        lines = [f"# `{package}`", "", _ABOUT[package], ""]
        for title, modules in groups:
            names = []
            for module in modules:
                name = f"{package}.{module}"
                pages[f"{name}.md"] = module_page(name)
                names.append(name)
            lines += [f"## {title}", "", toctree(names)]
        pages[f"{package}.md"] = "\n".join(lines)
    pages["index.md"] = "\n".join(
        [
            "# Programming interface",
            "",
            "Imports point one way: `experiments` → `merging` → `theory`. What is not listed here is internal and",
            "may change.",
            "",
            toctree(list(PACKAGES), depth=2),
        ]
    )
    return pages


def module_page(name: str) -> str:
    """One module: its docstring and the public objects that it defines; a package's are those of ``__all__``."""
    importlib.import_module(name)  # a name that does not exist ends the build here
    options = [":members:", ":show-inheritance:"]
    if name == "theory.errors":
        options.append(":undoc-members:")
    body = "\n".join([f".. automodule:: {name}", *(f"   {option}" for option in options)])
    return f"# `{name}`\n\n```{{eval-rst}}\n{body}\n```\n"
