"""From repeated steps to figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from blip2x.engine.memory import begin_part, part_peak_gb
from blip2x.engine.run import Run
from blip2x.models.flops import Work as Amounts
from blip2x.models.flops import generation_flops, retrieval_flops, training_flops
from blip2x.parallel.seeding import seed_everything
from blip2x.tasks.benchmarking.clock import REST, Clock, timed, waiting_for
from blip2x.tasks.benchmarking.jobs import Job
from blip2x.tasks.benchmarking.work import Work, work_of


@dataclass(frozen=True)
class Spread:
    """Seconds of some repeats."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """At least one."""
        return cls(statistics.median(seconds), min(seconds), max(seconds))


@dataclass(frozen=True)
class Measured:
    """What the steps of a job cost; of several ranks, a step takes as long as on the slowest one.

    Attributes:
        images: of all ranks in a step.
        tokens: of all ranks in a step that had to be predicted, or were written; 0: none.
        plain: seconds of each repeat without timers inside.
        with_timers: the same with them.
        parts: name -> the seconds of each repeat with timers, of the first rank; they add up to its whole.
        flops: name -> multiplications and additions of a data rank's step, as if all texts had the length of the longest.
        amounts: what they were counted for: a data rank's micro-batch, or where nothing is trained its step.
        pairs: of an image and a text that were matched there; 0 but in a search.
        peak: of the same per second, this machine's best matrix product on all ranks that share a data rank's work.
        memory_gb: highest of any rank, GB of 2**30 bytes; None: it cannot be told from what came before.
    """

    job: Job
    images: int
    tokens: float
    plain: list[float]
    with_timers: list[float]
    parts: dict[str, list[float]]
    flops: dict[str, float]
    amounts: Amounts
    pairs: int
    peak: float
    memory_gb: float | None

    @property
    def step(self) -> Spread:
        """Seconds of a step, as it is when nobody looks inside."""
        return Spread.of(self.plain)

    @property
    def accumulate(self) -> int:
        """Micro-batches of a step."""
        return self.job.cfg.task.accumulate if self.job.trains else 1

    def part(self, name: str) -> Spread:
        """Seconds of a part of it."""
        return Spread.of(self.parts[name])

    @property
    def covered(self) -> float:
        """The sum of the parts' medians / the median of the whole without timers: 1 where these cost nothing."""
        return sum(self.part(name).median for name in self.parts) / self.step.median

    @property
    def flops_per_second(self) -> float:
        """Of a data rank."""
        return sum(self.flops.values()) / self.step.median

    @property
    def utilisation(self) -> float | None:
        """Of the machine's matrix peak; None: a data set's texts have other lengths, so that fewer operations were done."""
        return None if self.job.task.data else self.flops_per_second / self.peak

    def metrics(self) -> dict[str, float]:
        """For results.json."""
        step = self.step
        found = {"images_per_second": self.images / step.median}
        if self.tokens:
            found["tokens_per_second"] = self.tokens / step.median
        found |= {"step_seconds": step.median, "fastest_step_seconds": step.min, "slowest_step_seconds": step.max}
        found["gigaflop_per_step"] = sum(self.flops.values()) / 1e9
        found["gigaflop_per_second"] = self.flops_per_second / 1e9
        if self.utilisation is not None:
            found["utilisation"] = self.utilisation
        if self.memory_gb is not None:
            found["memory_gb"] = self.memory_gb
        return found | {f"step_seconds/part/{name}": self.part(name).median for name in self.parts}

    def record(self) -> dict[str, Any]:
        """For benchmark.json: everything."""
        return {
            "model": OmegaConf.to_container(OmegaConf.structured(self.job.cfg.model), enum_to_str=True),
            "images": self.images,
            "tokens": self.tokens,
            "step": {**vars(self.step), "seconds": self.plain},
            "step_with_timers": {**vars(Spread.of(self.with_timers)), "seconds": self.with_timers},
            "parts": {name: {**vars(self.part(name)), "seconds": seconds} for name, seconds in self.parts.items()},
            "parts_over_step": self.covered,
            "sizes": {**vars(self.amounts), "pairs": self.pairs, "accumulate": self.accumulate},
            "flops": self.flops,
            "flops_per_second": self.flops_per_second,
            "utilisation": self.utilisation,
            "memory_gb": self.memory_gb,
        }


def measure(
    job: Job,
    run: Run,
    build: Callable[[Job], tuple[Any, Any]],
    *,
    peak: float,
    advance: Callable[[int], None],
    timers: bool = True,
) -> Measured:
    """Warm up, then repeat with and without timers by turns, so that both meet the same machine.

    Args:
        job: what to measure.
        run: its own, whose console says nothing.
        build: gives the job's model and tokenizer.
        peak: see `Measured`.
        advance: told after each step how many images it had.
        timers: false: only without.
    """
    context = run.context
    has_memory = begin_part(context.device)
    model, tokenizer = build(job)
    seed_everything(job.cfg.seed, context.data_rank)
    work = work_of(job, run, model, tokenizer)
    wait = waiting_for(context.device)
    clock = Clock(wait)
    plain, with_timers, parts = [], [], []

    def step(timers: AbstractContextManager[None] = nullcontext()) -> float:  # noqa: B008  # it has no state
        context.barrier()
        wait()
        started = time.perf_counter()
        with timers:
            work.step(clock)
            wait()
        seconds = time.perf_counter() - started
        advance(work.images)
        return max(context.gather_objects(seconds))

    for _ in range(job.task.warmup):
        step()
    for _ in range(job.task.repeats):
        plain.append(step())
        if timers:
            with timed(clock, work.methods):
                with_timers.append(step(clock.running()))
            parts.append(clock.seconds)
    memory = part_peak_gb(context.device) if has_memory else None
    memories = context.gather_objects(memory)
    amounts = _amounts(work)
    return Measured(
        job,
        work.images,
        work.tokens,
        plain,
        with_timers,
        _by_part(parts),
        _flops(work, amounts, tokenizer.vocab_size),
        amounts,
        work.pairs,
        peak * context.tensor.size,
        None if None in memories else max(memories),
    )


def steps_of(job: Job, *, timers: bool = True) -> int:
    """How many steps `measure` makes."""
    return job.task.warmup + job.task.repeats * (1 + timers)


def _by_part(repeats: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Name -> seconds of each repeat, in the order in which parts came first, the rest last."""
    names = dict.fromkeys(name for seconds in repeats for name in seconds if name != REST)
    return {name: [seconds.get(name, 0.0) for seconds in repeats] for name in [*names, *([REST] if repeats else [])]}


def _amounts(work: Work) -> Amounts:
    job, context = work.job, work.run.context
    micro_batches = job.cfg.task.accumulate if job.trains else 1
    return Amounts(
        images=-(-work.images // (context.data_size * micro_batches)),
        texts=work.texts,
        text_tokens=work.text_tokens,
        output_tokens=work.output_tokens,
        new_tokens=job.cfg.task.max_new_tokens if job.decodes else 0,
        beams=max(job.cfg.task.num_beams, job.cfg.task.num_return_sequences) if job.decodes else 1,
    )


def _flops(work: Work, amounts: Amounts, vocab_size: int) -> dict[str, float]:
    job = work.job
    words = {"language" if job.reads_language else "qformer": vocab_size}
    if job.decodes:
        found = generation_flops(job.cfg.model, amounts, vocab_sizes=words)
    elif job.trains:
        found = _training_flops(work, amounts, words)
    else:
        found = retrieval_flops(job.cfg.model, amounts, pairs=work.pairs)
    return dict(found) if work.encodes else {**found, "vision": 0.0}  # an encoder whose outputs are kept is frozen


def _training_flops(work: Work, amounts: Amounts, words: Mapping[str, int]) -> dict[str, float]:
    cfg, contrasted = work.job.cfg, work.run.context.data_size
    if work.job.name == "pretrain_stage1" and cfg.task.cached_contrast:
        contrasted *= cfg.task.accumulate  # negatives come from all micro-batches, as they do from all ranks
    found = training_flops(cfg.model, work.job.name, amounts, data_ranks=contrasted, vocab_sizes=words)
    return {name: count * cfg.task.accumulate for name, count in found.items()}
