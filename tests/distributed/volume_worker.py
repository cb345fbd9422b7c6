"""One rank of two that train tiny models by one step each: `volume_worker.py <folder>`; writes rank<n>.json.

Bytes are those that are handed to paddle's collectives, and those that left this process by its sockets.
"""

import json
import os
import socket
import stat
import struct
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

from blip2x.startup import prepare_process

prepare_process(threads=1)

# ruff: noqa: E402  # has to run before paddle is imported
import paddle
import paddle.distributed as dist

from blip2x.config.compose import compose_config
from blip2x.config.run import Device, HybridConfig
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.models.assemblies.stage2 import build_stage2
from blip2x.models.freeze import freeze
from blip2x.objectives.stage1 import Stage1Objective
from blip2x.objectives.stage2 import Stage2Objective
from blip2x.optim.build import build_optimizer
from blip2x.registry import STRATEGIES
from tests.distributed.volume_plan import CASES, LENGTH, OUTPUT, ROWS, TRAININGS, WORDS, layout_config

TCP_BYTES_SENT = 200  # where Linux's tcp_info has it


def watch(counts):
    """Count what is handed to each collective, by name; control messages and numbers for logging are left to others."""

    def counting(name, given):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            tensor = given(*args, **kwargs)
            counts[name] += tensor.size * tensor.element_size()
            return original(*args, **kwargs)

        setattr(dist, name, call)

    counting("all_gather", lambda parts, tensor, *_, **__: tensor)
    for name in ("all_reduce", "reduce", "broadcast"):
        counting(name, lambda tensor, *_, **__: tensor)


def sent():
    """Bytes that this process has sent through TCP."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        if not os.path.exists(f"/proc/self/fd/{name}") or not stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
            continue
        with socket.socket(fileno=os.dup(int(name))) as found:
            if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, TCP_BYTES_SENT)[0]
    return total


def texts(length, name):
    ids = paddle.randint(6, min(WORDS.values()), [ROWS, length])
    return {name: ids, name.replace("ids", "mask"): paddle.ones_like(ids)}


def samples(cfg, kind):
    side = cfg.model.vision.image_size
    batch = {"image_BCHW": paddle.randn([ROWS, 3, side, side]), "image_id_B": paddle.arange(ROWS)}
    if kind in ("stage1", "cached"):
        return {**batch, **texts(LENGTH, "text_ids_BL")}
    if kind == "opt":
        text, place = texts(LENGTH, "text_ids_BL"), paddle.arange(ROWS * LENGTH)
        label_mask_BL = text["text_mask_BL"].clone()
        label_mask_BL[:, 0] = 0  # bos
        targets = {"label_mask_BL": label_mask_BL, "target_place_N": place[place % LENGTH > 0]}
        return {**batch, **text, **targets}
    return {**batch, **texts(LENGTH, "input_ids_BL"), **texts(OUTPUT, "output_ids_BT")}


def objective_of(cfg, kind, context):
    if kind in ("stage1", "cached"):
        model = build_stage1(cfg.model, vocab_size=WORDS["qformer"])
        freeze(model.vision)
        return Stage1Objective(model, context, cfg.task, dec_id=5)
    if context.tensor.size == 1:
        model = build_stage2(cfg.model, vocab_size=WORDS["language"])
    else:
        with paddle.LazyGuard():
            model = build_stage2(cfg.model, vocab_size=WORDS["language"])
        model.language.split_over(context.tensor)
        for parameter in model.parameters():
            parameter.initialize()
    freeze(model.vision)
    freeze(model.language)
    return Stage2Objective(model, context)


def step(counts, objective, optimizer, batches, context):
    """What is exchanged in the second of two steps, as the first one makes paddle's buffers."""
    wrapped, optimizer = context.wrap(objective, optimizer)
    for _ in range(2):
        counts.clear()
        before = sent()
        ready = objective.prepare(batches)
        for number, batch in enumerate(ready, start=1):
            with nullcontext() if number == len(ready) else context.accumulating(wrapped):
                wrapped(batch)["loss"].backward()
        optimizer.step()
        optimizer.clear_grad()
    return {**counts, "sent": sent() - before}


def main(folder):
    counts, found = Counter(), {}
    watch(counts)
    configs = {kind: compose_config(list(words)) for kind, words in TRAININGS.items()}
    for layout, kind, accumulate in CASES:
        context = STRATEGIES.get("hybrid")(HybridConfig(**layout_config(layout)), Device.cpu)
        cfg = configs[kind]
        paddle.seed(0)
        objective = objective_of(cfg, kind, context)
        optimizer, _ = build_optimizer(cfg.optim, objective, 10)
        batches = [samples(cfg, kind) for _ in range(accumulate)]
        found[f"{layout} {kind}"] = step(counts, objective, optimizer, batches, context)
    (Path(folder) / f"rank{context.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
