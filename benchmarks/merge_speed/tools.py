"""How each tool is run on files.  ``load(tool)`` imports it; what it returns merges one :class:`Job`.

``ours`` is the one place to change when this project's entry point changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.merge_speed.cases import Job

Run = Callable[[Job], None]


def load(tool: str, threads: int) -> Run:
    """Import a tool and return what merges with it.

    Raises:
        ImportError: it is not installed in this environment.
    """
    return {"ours": _ours, "mergekit": _mergekit, "fusionbench": _fusionbench, "floor": _floor}[tool](threads)


def version(tool: str) -> str:
    """The version of a tool and of torch in this environment."""
    from importlib.metadata import version as installed

    if tool == "floor":
        return "fadvise, readinto and write"
    package = {"ours": "mergebound", "mergekit": "mergekit", "fusionbench": "fusion-bench"}[tool]
    return f"{package} {installed(package)}, torch {installed('torch')}"


def output_files(out: Path) -> list[Path]:
    """The weights that a merge wrote."""
    return sorted(out.rglob("*.safetensors"))


def _ours(threads: int) -> Run:
    import torch

    import merging.streaming.run  # noqa: F401  # imported when it is needed; an import all the same
    from experiments.merge_job import Resources, execute, prepare, record_of
    from merging.config import ExpertEntry, MergeFile, build

    torch.set_num_threads(threads)

    def run(job: Job) -> None:
        """What ``mergebound merge --hash quick`` does, as it does by default above 1 GiB of inputs."""
        content = MergeFile(
            method=job.case.method,
            settings=dict(job.case.settings),
            base=job.base if job.case.base else None,
            experts=[ExpertEntry(file=path) for path in job.experts],
            out=job.out / "merged.safetensors",
        )
        checked = prepare(build(content, source=""))
        execute(checked, record_of(checked, hashing="quick"), Resources(threads=threads, streamed=True))

    return run


def _mergekit(threads: int) -> Run:
    """What ``mergekit-pytorch`` does: its merge of arbitrary state dicts, which needs no architecture that it knows."""
    import torch
    from mergekit.graph import Executor
    from mergekit.options import MergeOptions
    from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge

    torch.set_num_threads(threads)
    options = MergeOptions(quiet=True, random_seed=0)
    options.apply_global_options()

    def run(job: Job) -> None:
        assert job.case.mergekit is not None
        method, parameters = job.case.mergekit
        content: dict[str, Any] = {
            "merge_method": method,
            "models": [{"model": str(path)} for path in job.experts],
            "parameters": dict(parameters),
        }
        if job.case.base:
            content["base_model"] = str(job.base)
        if (
            job.dtype != "float32"
        ):  # the arithmetic in float32, as the other tools do it, and the storage type of inputs
            content |= {"dtype": "float32", "out_dtype": job.dtype}
        config = RawPyTorchMergeConfig.model_validate(content)
        tasks = plan_flat_merge(config, str(job.out), False, False, options)
        for _ in Executor(tasks, math_device="cpu", storage_device="cpu").run(quiet=True):
            pass

    return run


def _fusionbench(threads: int) -> Run:
    """FusionBench's algorithms on a pool whose models are loaded when asked for (mapped, no copy), and saved after."""
    import torch
    from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm, TiesMergingAlgorithm
    from fusion_bench.modelpool import BaseModelPool
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(threads)
    algorithms = {
        "average": SimpleAverageAlgorithm,
        "task_arithmetic": TaskArithmeticAlgorithm,
        "ties": TiesMergingAlgorithm,
    }

    def module(path: Path) -> torch.nn.Module:
        root = torch.nn.Module()
        for name, tensor in load_file(path).items():
            *parents, last = name.split(".")
            owner = root
            for part in parents:
                if part not in owner._modules:
                    owner.add_module(part, torch.nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
        return root

    class Files(BaseModelPool):  # type: ignore[misc]
        """A pool of files."""

        def load_model(self, model_name_or_config: str, *args: Any, **kwargs: Any) -> torch.nn.Module:
            return module(Path(str(self._models[model_name_or_config]["path"])))

    def run(job: Job) -> None:
        assert job.case.fusionbench is not None
        name, parameters = job.case.fusionbench
        files = {f"expert{index}": {"path": str(path)} for index, path in enumerate(job.experts)}
        if job.case.base:
            files["_pretrained_"] = {"path": str(job.base)}
        merged = algorithms[name](**parameters).run(Files(files))
        state = {key: value.detach().contiguous() for key, value in merged.state_dict().items()}
        save_file(state, job.out / "model.safetensors")

    return run


_BLOCK = 1 << 22


def _floor(threads: int) -> Run:
    """Read every input once, then write as many bytes as an input has; ``threads`` threads share the files.

    The system is told of this file and of the next before each is read, so that a cold disk never waits for us.
    """

    def announce(path: Path) -> None:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)

    def read(path: Path) -> None:
        buffer = bytearray(_BLOCK)
        with open(path, "rb", buffering=0) as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while handle.readinto(buffer):
                pass

    def run(job: Job) -> None:
        following = dict(zip(job.inputs, job.inputs[1:], strict=False))
        announce(job.inputs[0])

        def pair(path: Path) -> None:
            if path in following:
                announce(following[path])
            read(path)

        _share(threads, pair, job.inputs)
        block = os.urandom(_BLOCK)
        left = job.experts[0].stat().st_size
        with open(job.out / "floor.bin", "wb", buffering=0) as handle:
            while left > 0:
                left -= handle.write(block[: min(left, _BLOCK)])
            os.fsync(handle.fileno())

    return run


def _share(threads: int, work: Callable[[Path], None], files: Sequence[Path]) -> None:
    if threads == 1:
        for file in files:
            work(file)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, files))
