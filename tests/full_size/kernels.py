"""How long Paddle takes on this machine's CPU for the operations that BLIP-2 is made of, against PyTorch or alone.

    python tests/full_size/kernels.py                                  # milliseconds of Paddle
    python tests/full_size/kernels.py --against ENVIRONMENT/bin/python # beside PyTorch in an environment of its own
    python tests/full_size/kernels.py --only gelu                      # of operations with this in their name

Both run with the same number of threads, take turns, and the shortest time of each counts. N is 8 images x 257 tokens.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

ROUNDS, SECONDS = 5, 0.15  # turns of each side, and how long one lasts at least
SPINNING = 0.3  # OpenMP's threads look out for work that long, on the cores that the other side needs now
N, D, M, VOCAB = 8 * 257, 384, 1536, 50272


def operations_of_paddle() -> dict[str, Callable[[], object]]:
    from blip2x.startup import prepare_process

    prepare_process(int(os.environ["THREADS"]))
    import paddle
    import paddle.nn.functional as F
    from paddle import nn

    from blip2x.losses.lm import lm_loss
    from blip2x.losses.log_softmax import log_softmax
    from blip2x.models.linear import linear

    paddle.seed(0)

    def rand(*shape: int, grad: bool = False) -> paddle.Tensor:
        tensor = paddle.randn(list(shape))
        tensor.stop_gradient = not grad
        return tensor

    def both(forward: Callable[..., paddle.Tensor], *inputs: paddle.Tensor) -> Callable[[], object]:
        def call() -> object:
            out = forward(*inputs)
            return paddle.grad(out, list(inputs), paddle.ones_like(out))

        return call

    def update(shapes: list[list[int]], clip: float | None) -> Callable[[], object]:
        parameters = [paddle.create_parameter(shape, "float32") for shape in shapes]
        for parameter in parameters:
            parameter.grad = paddle.ones_like(parameter)
        bound = None if clip is None else nn.ClipGradByGlobalNorm(clip)
        return paddle.optimizer.AdamW(1e-4, parameters=parameters, weight_decay=0.05, grad_clip=bound).step

    def no_grad(function: Callable[..., object], *inputs: paddle.Tensor) -> Callable[[], object]:
        def call() -> object:
            with paddle.no_grad():
                return function(*inputs)

        return call

    class Block(nn.Layer):
        def __init__(self, width: int, heads: int, mlp: int):
            super().__init__()
            self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            rows, length, width = x.shape
            qkv = self.qkv(self.norm1(x)).reshape([rows, length, 3, self.heads, width // self.heads])
            x = x + self.out(F.scaled_dot_product_attention(*qkv.unbind(axis=2)).flatten(2))
            return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    return build(
        {
            "rand": rand,
            "both": both,
            "no_grad": no_grad,
            "update": update,
            "ids": lambda high, n: paddle.randint(0, high, [n]),
            "Block": Block,
            "matmul": paddle.matmul,
            "matmul_t": lambda a, b: paddle.matmul(a, b, transpose_y=True),
            "linear": F.linear,
            "weight": lambda inputs, outputs: rand(inputs, outputs, grad=True),
            "gelu": F.gelu,
            "gelu_tanh": lambda a: F.gelu(a, approximate=True),
            "quick_gelu": lambda a: a * F.sigmoid(1.702 * a),
            "relu": F.relu,
            "softmax": lambda a: F.softmax(a, axis=-1),
            "layer_norm": lambda a, w, b: F.layer_norm(a, [D], w, b),
            "dropout": lambda a: F.dropout(a, 0.1),
            "add": lambda a, b: a + b,
            "heads": lambda a: a.reshape([8, 257, 6, 64]).transpose([0, 2, 1, 3]).contiguous(),
            "unheads": lambda a: a.transpose([0, 2, 1, 3]).contiguous(),
            "attention": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
            "attention_axes": [8, 257, 6, 64],
            "embedding": F.embedding,
            "cross_entropy": F.cross_entropy,
            "concat": lambda a, b: paddle.concat([a, b], axis=1),
            "split": lambda a: [a[:, :32].contiguous(), a[:, 32:].contiguous()],
            "index_select": lambda a, i: paddle.index_select(a, i, axis=0),
            "mean": lambda a: a.mean(axis=1),
            "argmax": lambda a: paddle.argmax(a, axis=-1),
            "topk": lambda a: paddle.topk(a, 10),
            "log_softmax": lambda a: F.log_softmax(a, axis=-1),
            "our_log_softmax": lambda a: log_softmax(a, axis=-1),
            "our_linear": linear,
            "smoothed": lambda a, labels: lm_loss(a, labels, 0.1),
            "square_sum": lambda a: (a * a).sum(),
        }
    )


def operations_of_torch() -> dict[str, Callable[[], object]]:
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(int(os.environ["THREADS"]))
    torch.manual_seed(0)

    def both(forward: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], object]:
        def call() -> object:
            out = forward(*inputs)
            return torch.autograd.grad(out, inputs, torch.ones_like(out))

        return call

    def no_grad(function: Callable[..., object], *inputs: torch.Tensor) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return function(*inputs)

        return call

    def update(shapes: list[list[int]], clip: float | None) -> Callable[[], object]:
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        step = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.05).step
        return step if clip is None else lambda: (nn.utils.clip_grad_norm_(parameters, clip), step())

    class Block(nn.Module):
        def __init__(self, width: int, heads: int, mlp: int):
            super().__init__()
            self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows, length, width = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
            x = x + self.out(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))
            return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    return build(
        {
            "rand": lambda *shape, grad=False: torch.randn(shape, requires_grad=grad),
            "both": both,
            "no_grad": no_grad,
            "update": update,
            "ids": lambda high, n: torch.randint(0, high, [n]),
            "Block": Block,
            "matmul": torch.matmul,
            "matmul_t": lambda a, b: torch.matmul(a, b.transpose(-1, -2)),
            "linear": F.linear,
            "weight": lambda inputs, outputs: torch.randn(outputs, inputs, requires_grad=True),
            "gelu": F.gelu,
            "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
            "quick_gelu": lambda a: a * torch.sigmoid(1.702 * a),
            "relu": F.relu,
            "softmax": lambda a: F.softmax(a, -1),
            "layer_norm": lambda a, w, b: F.layer_norm(a, [D], w, b),
            "dropout": lambda a: F.dropout(a, 0.1),
            "add": lambda a, b: a + b,
            "heads": lambda a: a.reshape(8, 257, 6, 64).transpose(1, 2).contiguous(),
            "unheads": lambda a: a.transpose(1, 2).contiguous(),
            "attention": F.scaled_dot_product_attention,
            "attention_axes": [8, 6, 257, 64],
            "embedding": lambda i, w: F.embedding(i, w),
            "cross_entropy": F.cross_entropy,
            "concat": lambda a, b: torch.cat([a, b], 1),
            "split": lambda a: [a[:, :32].contiguous(), a[:, 32:].contiguous()],
            "index_select": lambda a, i: torch.index_select(a, 0, i),
            "mean": lambda a: a.mean(1),
            "argmax": lambda a: torch.argmax(a, -1),
            "topk": lambda a: torch.topk(a, 10),
            "log_softmax": lambda a: F.log_softmax(a, -1),
            "our_log_softmax": lambda a: F.log_softmax(a, -1),
            "our_linear": F.linear,
            "smoothed": lambda a, labels: F.cross_entropy(a.flatten(0, -2), labels.flatten(), label_smoothing=0.1),
            "square_sum": lambda a: (a * a).sum(),
        }
    )


def build(f: dict) -> dict[str, Callable[[], object]]:
    """The operations by name, out of what a framework calls them."""
    rand, both, no_grad = f["rand"], f["both"], f["no_grad"]

    def pair(name: str, function: Callable, *shapes: list[int]) -> dict[str, Callable[[], object]]:
        inputs = [rand(*shape, grad=True) for shape in shapes]
        return {name: no_grad(function, *inputs), f"{name}, with backward": both(function, *inputs)}

    found: dict[str, Callable[[], object]] = {}
    found |= {"matmul 1024": no_grad(f["matmul"], rand(1024, 1024), rand(1024, 1024))}
    x, w, b = rand(N, D, grad=True), f["weight"](D, M), rand(M, grad=True)
    found |= {"linear with bias [N,384]x[384,1536]": no_grad(f["linear"], x, w, b)}
    found |= {"linear with bias, with backward": both(f["linear"], x, w, b)}
    found |= {"the same by blip2x.models.linear": both(f["our_linear"], x, w, b)}
    found |= {"linear without bias": no_grad(f["linear"], x, w)}
    x, w, b = rand(1028, 1408), f["weight"](1408, 6144), rand(6144)
    found |= {"linear with bias [1028,1408]x[1408,6144]": no_grad(f["linear"], x, w, b)}
    for name in ("gelu", "gelu_tanh", "quick_gelu", "relu"):
        found |= pair(f"{name} [N,1536]", f[name], [N, M])
    found |= pair("softmax [8,6,257,257]", f["softmax"], [8, 6, 257, 257])
    found |= pair("layer_norm [N,384]", f["layer_norm"], [N, D], [D], [D])
    found |= pair("dropout [N,384]", f["dropout"], [N, D])
    found |= pair("add [N,384]", f["add"], [N, D], [N, D])
    found |= pair("add of a bias [N,1536]+[1536]", f["add"], [N, M], [M])
    found |= pair("add of a mask [8,6,257,257]+[8,1,1,257]", f["add"], [8, 6, 257, 257], [8, 1, 1, 257])
    found |= pair("heads apart [8,257,384]", f["heads"], [8, 257, D])
    found |= pair("heads together [8,6,257,64]", f["unheads"], [8, 6, 257, 64])
    found |= pair("attention's scores [8,6,257,64]", f["matmul_t"], *2 * [[8, 6, 257, 64]])
    found |= pair("attention's mixing [8,6,257,257]", f["matmul"], [8, 6, 257, 257], [8, 6, 257, 64])
    found |= pair("scaled_dot_product_attention", f["attention"], *3 * [f["attention_axes"]])
    ids, table = f["ids"](VOCAB, 512), rand(VOCAB, 768, grad=True)
    found |= {"embedding, 512 of 50272 x 768": no_grad(f["embedding"], ids, table)}
    found |= {"embedding, with backward": both(lambda w: f["embedding"](ids, w), table)}
    found |= pair("tied head [256,768]x[50272,768]", f["matmul_t"], [256, 768], [VOCAB, 768])
    found |= {"tied head of 5 rows": no_grad(f["matmul_t"], rand(5, 768), table)}
    labels = f["ids"](VOCAB, 256)
    found |= pair("cross_entropy [256,50272]", lambda a: f["cross_entropy"](a, labels), [256, VOCAB])
    words = f["ids"](30522, 248).reshape([8, 31])
    found |= pair("lm_loss with smoothing [8,31,30522]", lambda a: f["smoothed"](a, words), [8, 31, 30522])
    for name in ("argmax", "topk", "log_softmax"):
        found |= {f"{name} [5,50272]": no_grad(f[name], rand(5, VOCAB))}
    found |= {"the same by blip2x.losses.log_softmax": no_grad(f["our_log_softmax"], rand(5, VOCAB))}
    found |= pair("concat [8,32,384] [8,225,384]", f["concat"], [8, 32, D], [8, 225, D])
    found |= {"split [8,257,384]": no_grad(f["split"], rand(8, 257, D))}
    rows = f["ids"](8, 24)
    found |= pair("index_select, 24 of [8,257,384]", lambda a: f["index_select"](a, rows), [8, 257, D])
    found |= pair("mean over tokens [8,257,384]", f["mean"], [8, 257, D])
    found |= {"square and sum [1536,384]": no_grad(f["square_sum"], rand(M, D))}
    layer = [[D, D], [D]] * 8 + [[D]] * 8 + [[D, M], [M], [M, D], [D]] * 2
    found |= {"AdamW, 6 Q-Former layers": f["update"](layer * 6, None)}
    found |= {"AdamW with clipping": f["update"](layer * 6, 1.0)}
    found |= {"AdamW, 192 tensors of 384": f["update"]([[D]] * 192, None)}
    small, large = f["Block"](D, 6, M), f["Block"](1408, 16, 6144)
    x, y = rand(8, 257, D, grad=True), rand(4, 257, 1408, grad=True)
    found |= {"block of 384": no_grad(small, x), "block of 384, with backward": both(small, x)}
    found |= {"block of ViT-g, 4 images": no_grad(large, y), "block of ViT-g, with backward": both(large, y)}
    return found


def measure(function: Callable[[], object]) -> float:
    """The shortest of its times, in milliseconds."""
    best, until = float("inf"), time.monotonic() + SECONDS
    while time.monotonic() < until:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best * 1000


def serve(side: str) -> None:
    """Measure the operation of each line of standard input."""
    out = os.dup(1)
    os.dup2(2, 1)  # what the frameworks print is not an answer
    found = {"paddle": operations_of_paddle, "torch": operations_of_torch}[side]()
    with os.fdopen(out, "w") as answers:
        print("\t".join(found), file=answers, flush=True)
        for line in sys.stdin:
            function = found[line.rstrip("\n")]
            function()
            print(measure(function), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="PYTHON", help="interpreter of an environment that has torch")
    parser.add_argument("--only", default="", help="operations with this in their name")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    env = {**os.environ, "THREADS": str(args.threads)}
    sides = []
    for python, side in ((sys.executable, "paddle"), (args.against, "torch")):
        if python:
            words = [python, __file__, "--serve", side]
            sides.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env))
    names, *_ = [side.stdout.readline().rstrip("\n").split("\t") for side in sides]
    print(f"{'':50}{'paddle':>10}" + (f"{'torch':>10}{'ratio':>8}" if args.against else ""))
    for name in (name for name in names if args.only in name):
        best = [float("inf")] * len(sides)
        for _ in range(ROUNDS):
            for number, side in enumerate(sides):
                if len(sides) > 1:
                    time.sleep(SPINNING)
                side.stdin.write(name + "\n")
                side.stdin.flush()
                best[number] = min(best[number], float(side.stdout.readline()))
        ratio = f"{best[0] / best[1]:8.2f}" if args.against else ""
        print(f"{name:50}" + "".join(f"{value:10.3f}" for value in best) + ratio, flush=True)
    for side in sides:
        side.stdin.close()
        side.wait()


if __name__ == "__main__":
    main()
