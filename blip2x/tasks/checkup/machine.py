"""What the tasks will run on: versions, devices, disks."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import paddle
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from blip2x.engine.amp import check_precision
from blip2x.engine.folders import MIN_FREE_BYTES, existing_folder
from blip2x.engine.memory_table import amount
from blip2x.engine.versions import versions
from blip2x.errors import UserError
from blip2x.tasks.checkup.examined import Examined
from blip2x.tasks.checkup.findings import Findings, sentence
from blip2x.tasks.checkup.memory import rank_count, ranks_here

MACHINE = "machine"
_DECISIVE = ("paddlenlp", "numpy", "hydra-core", "omegaconf", "tokenizers", "safetensors", "pyarrow", "aistudio-sdk")
_PADDLE = ("paddlepaddle", "paddlepaddle-gpu")  # one of the two is enough


def check_versions() -> Findings:
    """Whether what is installed is what blip2x was tested with, as its package says."""
    out = Findings(MACHINE)
    wanted = _required()
    if not wanted:
        out.look(
            "versions", "blip2x is not installed, so nothing says which versions it needs", "pip install -e . in its folder"
        )
    found = {name: _installed(name) for name in (*_PADDLE, *_DECISIVE)}
    good = []
    for name, version in found.items():
        allowed = wanted.get(name)
        if version is None:
            if name in _DECISIVE and allowed is not None:
                out.broken("versions", f"{name} is not installed", f'pip install "{name}{allowed}"')
        elif allowed is not None and not allowed.contains(version, prereleases=True):
            out.broken("versions", f"{name} {version} is installed, tested: {allowed}", f'pip install "{name}{allowed}"')
        else:
            good.append(f"{name} {version}")
    if good:
        out.fine("versions", ", ".join(good))
    out.record = {"versions": {**versions(), **found}}
    return out


def _required() -> dict[str, SpecifierSet]:
    try:
        words = metadata.requires("blip2x") or []
    except metadata.PackageNotFoundError:
        return {}
    return {requirement.name.lower(): requirement.specifier for requirement in map(Requirement, words)}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_devices(examined: list[Examined]) -> Findings:
    """What Paddle sees, and whether it can do what the tasks ask for."""
    out, first = Findings(MACHINE), examined[0]
    device, cores = first.device, len(os.sched_getaffinity(0))
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    threads = first.cfg.threads or cores
    seen = f"{gpus} GPUs" if gpus else "no GPU" if paddle.is_compiled_with_cuda() else "no GPU (a build for CPUs)"
    out.fine("devices", f"computes on {device}; Paddle sees {seen}, {cores} cores; {threads} threads per rank")
    if threads > cores:
        out.look("threads", f"threads={threads}, but this process may use {cores} cores", f"set threads={cores}, or null")
    lacking: dict[str, str] = {}
    for each in examined:
        try:
            check_precision(each.cfg, device)
        except UserError as error:
            lacking.setdefault(sentence(error), each.name)
        ranks = ranks_here(rank_count(each.layout), os.environ)
        if gpus and ranks > gpus:
            lacking.setdefault(f"{ranks} ranks on this machine, which has {gpus} GPUs", each.name)
    for said in lacking:
        out.look("devices", said, "as it should be where the task will run elsewhere")
    out.record = {"devices": {"device": device, "gpus": gpus, "cores": cores, "threads": threads}}
    return out


def check_disk(examined: list[Examined]) -> Findings:
    """Whether the run folders' disk can be written and has room for all checkpoints, and the cache for what is kept there."""
    out, paths = Findings(MACHINE), examined[0].cfg.paths
    wanted, stages = MIN_FREE_BYTES, []
    for each in examined:
        if each.trains:
            size = checkpoints_bytes(each)
            wanted += size
            stages.append(f"{amount(size)} for {each.name}")
    needs = f"{amount(wanted)} for checkpoints and results" + (f" ({', '.join(stages)})" if stages else "")
    for name, folder, need, what in (
        ("outputs", Path(paths.outputs), wanted, needs),
        ("cache", Path(paths.cache), 0, "what is made anew at any time"),
    ):
        _judge_folder(out, f"paths.{name}", folder, need, what)
    return out


def checkpoints_bytes(examined: Examined) -> int:
    """What a training's checkpoints take: one more than are kept, as an old one goes when the new one is whole."""
    return (examined.cfg.task.keep_last + examined.cfg.task.keep_best + 1) * examined.predicted[0].checkpoint


def _judge_folder(out: Findings, check: str, folder: Path, need: int, what: str) -> None:
    existing = existing_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=existing):  # a mode alone does not tell: a disk may be mounted to be read only
            pass
    except OSError as error:
        out.broken(check, f"{folder} cannot be written: {error.strerror or error}", f"set {check} to a folder that can be")
        return
    free = shutil.disk_usage(existing).free
    said = f"{folder}: {amount(free)} free, can be written; wanted: {what}"
    if free < need:
        out.broken(check, said, f"make room, set {check} to another disk, or lower task.keep_last and task.keep_best")
    else:
        out.fine(check, said)
