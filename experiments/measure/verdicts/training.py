"""How an expert was trained, against what sections 4 to 6 of the theory cover: from its recipe and its log."""

from __future__ import annotations

import numpy as np

from experiments.finetune.loop import TrainingLog
from experiments.grid.run_spec import RunSpec
from experiments.measure.noise.recipe import learning_rates, logged_norms
from experiments.measure.verdicts.finding import Evidence, Finding, finding
from theory.drift import buffer_weights

KEYS = (
    *("sgd", "no_clipping", "no_momentum", "heavy_ball", "coupled_decay", "no_decay", "unbiased_batches"),
    *("known_sampling", "log", "same_coordinates", "frozen_head"),
)
_SLACK = 1e-4
_UNKNOWN = "how the expert was trained is not known (checkpoints alone)"
_OPEN = "open the experts from the store of a grid, or state the recipe"


def judge_recipe(
    name: str, run: RunSpec | None, log: TrainingLog | None, *, n: int | None = None, drift: float | None = None
) -> tuple[Finding, ...]:
    """All of :data:`KEYS` of one expert.

    Args:
        name: of the expert.
        run, log: its recipe and log; ``None`` where they are not known.
        n: size of S_i.
        drift: ``|Delta_i|`` of everything trained, which the log must be able to explain.
    """
    if run is None:
        return tuple(finding(key, name, "unknown", _UNKNOWN, remedy=_OPEN) for key in KEYS)
    return (
        _optimizer(name, run),
        _clipping(name, run, log),
        _momentum(name, run),
        _nesterov(name, run),
        *_decay(name, run),
        _batches(name, run, n),
        _sampling(name, run, log, n),
        judge_log(name, run, log, drift),
        _coordinates(name, run),
        _head(name, run),
    )


def _optimizer(name: str, run: RunSpec) -> Finding:
    if run.optimizer == "sgd":
        return finding("sgd", name, "holds", "SGD by the recipe")
    covered = "its gradient is of another point" if run.optimizer == "sam" else "its step is no multiple of a gradient"
    return finding(
        "sgd", name, "violated", f"{run.optimizer}: {covered}", covered=True,
        remedy="the measured drift and the cap sqrt(2) d hold for any optimizer",
    )  # fmt: skip


def _clipping(name: str, run: RunSpec, log: TrainingLog | None) -> Finding:
    if run.clip_norm is None:
        return finding("no_clipping", name, "holds", "no clipping by the recipe")
    limit = Evidence.exact("clip_norm", run.clip_norm, "recipe")
    if log is None or log.clip_factor is None:
        return finding("no_clipping", name, "unknown", "clipping is on, and there is no log of it", limit)
    steps = int((np.asarray(log.clip_factor) < 1.0).sum())
    share = Evidence.exact("share of steps that were clipped", steps / max(len(log.clip_factor), 1), "every step")
    if steps:
        return finding(
            "no_clipping", name, "violated", f"{steps} of {len(log.clip_factor)} gradients were clipped", share, limit,
            covered=True, remedy="6(d) holds with the clipped norms of the log, the cap with the measured drift",
        )  # fmt: skip
    why = "clipping is on but never acted in this run; a twin's gradients may be longer"
    return finding("no_clipping", name, "unknown", why, share, limit, seen="for", remedy="switch clipping off")


def _momentum(name: str, run: RunSpec) -> Finding:
    beta = Evidence.exact("beta", run.momentum, "recipe")
    if run.optimizer == "adamw":
        return finding("no_momentum", name, "violated", "AdamW averages gradients", beta)
    if run.momentum == 0.0:
        return finding("no_momentum", name, "holds", "beta = 0", beta)
    return finding(
        "no_momentum", name, "violated", f"beta = {run.momentum:g}", beta,
        remedy="take 6(b) or 6(d) and a measured training risk: forms for any momentum",
    )  # fmt: skip


def _nesterov(name: str, run: RunSpec) -> Finding:
    if not run.nesterov:
        return finding("heavy_ball", name, "holds", "not Nesterov's form")
    return finding(
        "heavy_ball", name, "violated", "Nesterov's form", covered=True, remedy="the clock has Nesterov's own response"
    )


def _decay(name: str, run: RunSpec) -> tuple[Finding, Finding]:
    omega = Evidence.exact("omega", run.weight_decay, "recipe")
    if run.weight_decay == 0.0:
        return tuple(finding(key, name, "holds", "omega = 0", omega) for key in ("coupled_decay", "no_decay"))  # type: ignore[return-value]
    remedy = "take the gradient log (its norms contain the decay) in place of the loss log"
    nothing = finding("no_decay", name, "violated", f"omega = {run.weight_decay:g}", omega, remedy=remedy)
    if run.optimizer != "adamw":
        return finding("coupled_decay", name, "holds", "added to the gradient before the buffer", omega), nothing
    why = "AdamW's decay is decoupled"
    return finding("coupled_decay", name, "violated", why, omega, covered=True), nothing


def _batches(name: str, run: RunSpec, n: int | None) -> Finding:
    if run.sampling != "reshuffle":
        return finding("unbiased_batches", name, "holds", f"{run.sampling}: batches are drawn anew at every step")
    if n is not None and run.batch_size >= n:
        whole = Evidence.exact("n", n, "training sample")
        return finding("unbiased_batches", name, "holds", "every batch is the whole sample", whole)
    why = "reshuffling: given what an epoch has shown already, the next batch is biased"
    evidence = [Evidence.exact("b", run.batch_size, "recipe")]
    if n is not None:
        evidence += [Evidence.exact("epochs", run.steps / np.ceil(n / run.batch_size), "recipe")]
    return finding(
        "unbiased_batches", name, "violated", why, *evidence,
        remedy="take forms for any sampling: 6(b), 6(d), theorem 2 (sup); or train without_replacement",
    )  # fmt: skip


def batch_sizes(n: int, size: int, steps: int, sampling: str) -> np.ndarray:
    """Batch sizes that a sampling gives, (K,): under reshuffling the short last batch of every epoch is kept."""
    if sampling != "reshuffle" or size >= n:
        return np.full(steps, min(size, n) if sampling == "reshuffle" else size, dtype=np.float64)
    epoch = [size] * (n // size) + ([n % size] if n % size else [])
    return np.array([epoch[k % len(epoch)] for k in range(steps)], dtype=np.float64)


def _sampling(name: str, run: RunSpec, log: TrainingLog | None, n: int | None) -> Finding:
    if log is None or n is None:
        why = f"{run.sampling} by the recipe; without log and sample the batches cannot be checked"
        return finding("known_sampling", name, "unknown", why, seen="for")
    expected = batch_sizes(n, run.batch_size, len(log.batch_size), run.sampling)
    wrong = int((np.asarray(log.batch_size) != expected).sum())
    evidence = Evidence.exact("logged batches of another size than the scheme's", wrong, "every step")
    if wrong:
        why = f"{wrong} of {len(expected)} logged batch sizes are not those of {run.sampling} with n = {n}"
        return finding("known_sampling", name, "violated", why, evidence, remedy="give the scheme that was used")
    return finding("known_sampling", name, "holds", f"{run.sampling}, and every logged batch has its size", evidence)


def judge_log(name: str, run: RunSpec, log: TrainingLog | None, drift: float | None) -> Finding:
    """The log has every step and can explain the drift: ``|Delta| <= sum w_hat_k |g_k|`` (6(d)) holds surely.

    A longer drift proves that the log is not of this run (or of another optimizer's steps).
    """
    if log is None:
        return finding("log", name, "unknown", "there is no training log", remedy=_OPEN)
    if run.optimizer == "adamw":
        return finding("log", name, "violated", "AdamW's step is no weighted sum of gradients",
                       remedy="take the measured drift")  # fmt: skip
    if run.trained == "low_rank":
        return finding("log", name, "violated", "the log is of the factors' gradients, not of the merged matrices",
                       remedy="take the measured drift")  # fmt: skip
    count = len(log.batch_loss)
    steps = Evidence.exact("logged steps", count, "log")
    if count != run.steps:
        return finding("log", name, "violated", f"the log has {count} of {run.steps} steps", steps)
    reach = float(buffer_weights(learning_rates(run), run.momentum, nesterov=run.nesterov) @ logged_norms(log))
    bound = Evidence.exact("sum w_hat_k |g_k|", reach, "every step")
    if drift is None:
        return finding("log", name, "unknown", "every step is there; the drift is not known", steps, bound, seen="for")
    moved = Evidence.exact("|Delta|", drift, "checkpoints")
    if drift > reach * (1 + _SLACK):
        why = "the expert moved further than its log allows: the log is of another run"
        return finding("log", name, "violated", why, steps, bound, moved, remedy="open the log of this run")
    return finding("log", name, "holds", "every step is there, and the drift is within its reach", steps, bound, moved)


def _coordinates(name: str, run: RunSpec) -> Finding:
    if run.trained != "low_rank":
        return finding("same_coordinates", name, "holds", f"trained = {run.trained}")
    why = f"rank-{run.rank} factors were trained; merged are the matrices, which are products of them"
    remedy = "constants of the matrices do not describe steps of the factors: take the measured drift"
    return finding("same_coordinates", name, "violated", why, remedy=remedy)


def _head(name: str, run: RunSpec) -> Finding:
    if run.trained == "backbone":
        return finding("frozen_head", name, "holds", "the head was frozen")
    why = "a private head was trained, too"
    remedy = "max(1, c_i) takes the place of c_i, or measure shared and private parts apart"
    return finding("frozen_head", name, "violated", why, covered=True, remedy=remedy)
