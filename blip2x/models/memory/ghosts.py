"""Tensors without numbers, and paddle's operations on them: who is in memory when, forward and backward.

Paddle keeps the operands of matrix products and of multiplications, the inputs of norms and of GELU, the outputs of softmax and
of ReLU until the backward pass has used them; of sums, copies and reshaping it keeps nothing. A frozen weight changes nothing
about that, as long as a gradient flows through. Everything else lives as long as a Python variable names it, and so do ghosts:
their bytes are counted from their making until Python lets go of them.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]


class Ledger:
    """Bytes that are in memory now, by part of the model, and at the fullest moment so far."""

    def __init__(self):
        self.part = ""  # of what is made now
        self.phase = "forward"
        self.now: Counter[str] = Counter()
        self.total = 0
        self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self.where = ""

    def add(self, part: str, size: int) -> None:
        """`size` more bytes; less where it is negative."""
        self.now[part] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak, self.where = self.total, self.now.copy(), f"{self.part}, {self.phase}"


class Memory:
    """A block of memory; it is counted as long as it is there."""

    def __init__(self, ledger: Ledger, size: int):
        self.ledger, self.part, self.size = ledger, ledger.part, size
        ledger.add(self.part, size)

    def __del__(self):
        self.ledger.add(self.part, -self.size)


@dataclass(eq=False)
class Node:
    """How gradients go back through one operation.

    Attributes:
        part: of the model.
        inputs: where the gradients go to, with their bytes.
        kept: what the operation needs for that.
        in_place: the first input's gradient takes the place of the output's.
        outputs: tensors whose gradients it waits for; those of a single one are added up as they come.
        scratch: bytes while it goes back.
        again: what is done first, where the operation has to be computed once more.
    """

    part: str
    inputs: list[tuple[Node, int]]
    kept: list[Memory] = field(default_factory=list)
    in_place: bool = False
    outputs: int = 1
    scratch: int = 0
    again: Callable[[], None] | None = None
    is_again: bool = False


@dataclass(eq=False)
class Ghost:
    """A tensor: its shape, the bytes of one number, its memory, and where its gradient goes (None: it needs none)."""

    shape: Shape
    size: int
    memory: Memory
    node: Node | None = None

    @property
    def count(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


class Tracer:
    """Paddle's operations on ghosts, in training.

    Args:
        low: bytes of a number in and between matrix products.
        full: of a number in norms, softmax and losses.
    """

    def __init__(self, *, low: int = 4, full: int = 4):
        self.ledger = Ledger()
        self.low, self.full = low, full
        self._leaves: dict[str, Node] = {}
        self._records = True
        self._recomputed: list[Node] | None = None  # where the nodes of a recomputed function are collected
        self._kept_again: list[list[Memory]] | None = None  # what they keep when it is computed again

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """What is made inside belongs to `part`."""
        before, self.ledger.part = self.ledger.part, part
        yield
        self.ledger.part = before

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """As paddle's."""
        before, self._records = self._records, False
        yield
        self._records = before

    def make(self, shape: Sequence[int], size: int, *, node: Node | None = None) -> Ghost:
        """A new tensor."""
        shape = tuple(shape)
        return Ghost(shape, size, Memory(self.ledger, math.prod(shape) * size), node)

    def leaf(self, name: str) -> Node:
        """Where the gradient of the trained parameter `name` goes, whoever uses it."""
        return self._leaves.setdefault(name, Node(self.ledger.part, []))

    def needs_gradient(self, *nodes: Node | None) -> bool:
        """Whether an operation on them is recorded."""
        return self._records and any(node is not None for node in nodes)

    def apply(
        self,
        shape: Sequence[int],
        size: int,
        sources: Sequence[tuple[Node | None, int]],
        *,
        keep: Sequence[Ghost] = (),
        keep_result: bool = False,
        in_place: bool = False,
        scratch: int = 0,
        scratch_back: int = 0,
    ) -> Ghost:
        """An operation with a new result: where gradients go and their bytes, what it keeps, bytes while it runs (and back)."""
        result = self.make(shape, size)
        if scratch:
            Memory(self.ledger, scratch)  # and gone
        if self.needs_gradient(*(node for node, _ in sources)):
            kept = [ghost.memory for ghost in keep] + ([result.memory] if keep_result else [])
            result.node = self._node(sources, kept, in_place=in_place and sources[0][0] is not None)
            result.node.scratch = scratch_back
        return result

    def _node(
        self, sources: Sequence[tuple[Node | None, int]], kept: list[Memory], *, in_place: bool = False, outputs: int = 1
    ) -> Node:
        inputs = [(node, count) for node, count in sources if node is not None]
        node = Node(self.ledger.part, inputs, [], in_place, outputs)
        if self._kept_again is not None:
            self._kept_again.append(kept)
        elif self._recomputed is not None:
            self._recomputed.append(node)
        else:
            node.kept = kept
        return node

    def elementwise(self, x: Ghost, *, keep: bool = False, keep_result: bool = False, size: int | None = None) -> Ghost:
        """A tensor of the same shape; it goes back by its input, by its result (then in place), or by neither."""
        sources = [(x.node, x.count * x.size)]
        kept = [x] if keep else []
        return self.apply(x.shape, size or x.size, sources, keep=kept, keep_result=keep_result, in_place=keep_result)

    def cast(self, x: Ghost, size: int) -> Ghost:
        """`x` itself where it has that type."""
        return x if x.size == size else self.elementwise(x, size=size)

    def view(self, x: Ghost, shape: Sequence[int]) -> Ghost:
        """Another shape of the same memory."""
        node = None
        if self.needs_gradient(x.node):
            node = self._node([(x.node, x.count * x.size)], [], in_place=True)
        return Ghost(tuple(shape), x.size, x.memory, node)

    def add(self, x: Ghost, y: Ghost) -> Ghost:
        """A sum; a smaller one of the two is broadcast."""
        shape = x.shape if x.count >= y.count else y.shape
        sources = [(x.node, x.count * x.size), (y.node, y.count * y.size)]
        return self.apply(shape, max(x.size, y.size), sources, in_place=x.shape == shape)

    def multiply(self, x: Ghost, y: Ghost) -> Ghost:
        """A product by elements; a smaller one of the two is broadcast."""
        shape = x.shape if x.count >= y.count else y.shape
        sources = [(x.node, x.count * x.size), (y.node, y.count * y.size)]
        return self.apply(shape, max(x.size, y.size), sources, keep=[x, y])

    def matmul(self, x: Ghost, y: Ghost, shape: Sequence[int]) -> Ghost:
        """A matrix product of two tensors."""
        x, y = self.cast(x, self.low), self.cast(y, self.low)
        return self.apply(shape, self.low, [(x.node, x.count * x.size), (y.node, y.count * y.size)], keep=[x, y])

    def linear(self, x: Ghost, name: str, width: int, *, trained: bool, bias: bool = True) -> Ghost:
        """The last axis becomes `width` long, by a matrix, and perhaps a bias, called `name`."""
        x = self.cast(x, self.low)
        shape, matrix = (*x.shape[:-1], width), x.shape[-1] * width
        weight = None
        keep = [x]
        if trained:
            weight = self.leaf(name)
            if self.low != self.full:  # a parameter of the full type, cast each time it is used
                cast = self.apply((matrix,), self.low, [(weight, matrix * self.full)])
                weight, keep = cast.node, [x, cast]
        scratch = math.prod(shape) * self.low if bias else 0
        return self.apply(
            shape, self.low, [(x.node, x.count * x.size), (weight, matrix * self.low)], keep=keep, scratch=scratch
        )

    def embed(self, name: str, shape: Sequence[int], words: int, *, trained: bool, size: int) -> Ghost:
        """Rows of a table of `words`; its gradient is dense."""
        node = self.leaf(name) if trained else None
        return self.apply(shape, size, [(node, words * shape[-1] * size)])

    def norm(self, x: Ghost, name: str | None = None) -> Ghost:
        """LayerNorm; `name` of its weights where nothing but these may need a gradient. They are too small to count."""
        x = self.cast(x, self.full)
        size = x.count * x.size
        weight = self.leaf(name) if name else None
        moments = self.make((*x.shape[:-1], 2), self.full)
        return self.apply(x.shape, x.size, [(x.node, size), (weight, 0)], keep=[x, moments], scratch_back=2 * size)

    def softmax(self, x: Ghost) -> Ghost:
        """Over the last axis."""
        x = self.cast(x, self.full)
        return self.apply(x.shape, x.size, [(x.node, x.count * x.size)], keep_result=True)

    def dropout(self, x: Ghost, rate: float) -> Ghost:
        """With its mask of a byte per number."""
        if not rate:
            return x
        mask = self.make(x.shape, 1)
        return self.apply(x.shape, x.size, [(x.node, x.count * x.size)], keep=[mask])

    def transpose(self, x: Ghost, shape: Sequence[int]) -> Ghost:
        """A copy in another order, also a part of it (slice) or its repetition (expand)."""
        return self.apply(shape, x.size, [(x.node, x.count * x.size)])

    def concat(self, parts: Sequence[Ghost], shape: Sequence[int]) -> Ghost:
        """One after the other."""
        return self.apply(shape, max(part.size for part in parts), [(part.node, part.count * part.size) for part in parts])

    def split(self, x: Ghost, count: int, shape: Sequence[int]) -> list[Ghost]:
        """`count` copies of parts; they go back together."""
        node = None
        if self.needs_gradient(x.node):
            node = self._node([(x.node, x.count * x.size)], [], outputs=count)
        return [self.make(shape, x.size, node=node) for _ in range(count)]

    def reduce(self, x: Ghost, shape: Sequence[int], *, keep: bool = False) -> Ghost:
        """A sum, a mean, or, with `keep`, a maximum or the logarithm of a sum of exponentials."""
        return self.apply(shape, x.size, [(x.node, x.count * x.size)], keep=[x] if keep else [])

    def recompute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)`, of which nothing but the arguments is kept; it is computed again on the way back."""
        if not self._records:
            return function(*arguments)
        nodes, before = [], self._recomputed
        self._recomputed = nodes
        result = function(*arguments)
        self._recomputed = before

        def again() -> None:
            if nodes[0].is_again:
                return
            for node in nodes:
                node.is_again = True
            kept: list[list[Memory]] = []
            self._kept_again = kept
            function(*arguments)
            self._kept_again = None
            for node, memories in zip(nodes, kept, strict=True):
                node.kept += memories

        for node in nodes:
            node.again = again
        return result

    def backward(self, root: Node) -> None:
        """Go back from `root` as paddle does: first come, first served, parameters at once."""
        waits: Counter[Node] = Counter()
        seen, stack = {root}, [root]
        while stack:
            for node, _ in stack.pop().inputs:
                waits[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
        phase, part = self.ledger.phase, self.ledger.part
        self.ledger.phase = "backward"
        held: dict[Node, list[Memory]] = {root: [Memory(self.ledger, 0)]}
        queue = deque([root])
        while queue:
            node = queue.popleft()
            self.ledger.part = node.part
            gradients = self._gradients(node, held.pop(node))
            node.kept.clear()
            for source, memory in gradients:
                there = held.setdefault(source, [])
                if not there or source.outputs > 1:
                    there.append(memory)  # else it is added to what is there
                waits[source] -= 1
                if not waits[source]:
                    queue.append(source) if source.inputs else queue.appendleft(source)
            gradients = memory = None
        for node in seen:
            node.again = None  # until now paddle holds the arguments
        self.ledger.phase, self.ledger.part = phase, part

    def _gradients(self, node: Node, gradient: list[Memory]) -> list[tuple[Node, Memory]]:
        if node.again:
            node.again()
        scratch = Memory(self.ledger, node.scratch)
        found: list[tuple[Node, Memory]] = []
        for index, (source, size) in enumerate(node.inputs):
            found.append((source, gradient[0] if node.in_place and not index else Memory(self.ledger, size)))
        del scratch
        return found


def call(layer: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """`layer(...)`; a paddle layer's caller holds the arguments until it returns."""
    return layer(*arguments, **named)
