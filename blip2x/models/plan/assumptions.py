"""What a plan takes for granted: machines, and what share of their speed a program gets. A plan is printed with all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GIB = 2**30

# Share of the peak that the products of each part get. Wide towers: Megatron-LM's 1.7 to 7.5 billion parameters got 44 % on
# A100 (Narayanan et al., 2021, arXiv 2104.04473, table 1), with fused kernels that we do not have. The Q-Former is narrow (768)
# and its rows are short, so most of its time goes to launches and memory. No figure here was measured on a GPU.
UTILISATION = {"vision": 0.35, "qformer": 0.15, "language": 0.35}
STEP_OVERHEAD = 0.02  # seconds of a step that the GPU waits: launches, the loop, logging


@dataclass(frozen=True)
class Machine:
    """A kind of GPU and how it is connected. Bytes and operations per second, of one GPU and in one direction.

    Attributes:
        title: for readers.
        peak: operations per second of dense matrix products in bfloat16.
        memory: bytes.
        memory_speed: bytes per second that it reads or writes.
        inside: bytes per second to the other GPUs of its node.
        outside: bytes per second of its network card.
        node: GPUs of a node.
        source: where the numbers are from.
        utilisation: share of the peak that each part's products get.
        overhead: seconds of a step in which nothing is computed.
    """

    title: str
    peak: float
    memory: float
    memory_speed: float
    inside: float
    outside: float
    node: int
    source: str
    utilisation: Mapping[str, float] = field(default_factory=lambda: UTILISATION)
    overhead: float = STEP_OVERHEAD


MACHINES = {
    "a100_40gb": Machine(
        "A100 40 GB", 312e12, 40 * GIB, 1.555e12, 300e9, 25e9, 8, "NVIDIA's A100 datasheet; DGX A100: 8 x HDR InfiniBand"
    ),
    "a100_80gb": Machine(
        "A100 80 GB", 312e12, 80 * GIB, 2.039e12, 300e9, 25e9, 8, "NVIDIA's A100 datasheet; DGX A100: 8 x HDR InfiniBand"
    ),
    "h100_80gb": Machine(
        "H100 80 GB", 989e12, 80 * GIB, 3.35e12, 450e9, 50e9, 8, "NVIDIA's H100 SXM datasheet; DGX H100: 8 x NDR InfiniBand"
    ),
}
# The paper's: 16 GPUs of 40 GB, all of one node (BLIP-2, section 3.4)
PAPER_MACHINE = Machine(
    "16 x A100 40 GB, one node",
    312e12,
    40 * GIB,
    1.555e12,
    300e9,
    25e9,
    16,
    "NVIDIA's A100 datasheet; a single machine, as it says",
)

MEMORY_USED = 0.90  # of a GPU's memory, for tensors: the rest is CUDA's, NCCL's, and gaps of the allocator
MEMORY_SPEED_USED = 0.80  # of the memory's speed, as STREAM-like kernels get
LINK_USED = 0.80  # of a link's speed, as nccl-tests get with large messages
LATENCY = 20e-6  # seconds that an exchange takes however small it is, for each doubling of its ranks
OVERLAP = 0.5  # of a micro-batch's way back through what is trained, behind which data parallelism's sums can hide
# Bytes of AdamW's update per trained number: reads weight, gradient and two moments, writes weight and moments, all float32
UPDATE_BYTES = 28
# CPU seconds per training picture, by pixels of a side: 640 x 480 JPEGs, measured on a 2.1 GHz Xeon (docs/pipeline.md)
PICTURE_SECONDS = {224: 0.0044, 364: 0.0061, 490: 0.0073}
TIE = 0.02  # a layout has to be faster by this share to be worth more than a simpler one
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # GPUs
TENSOR_DEGREES = (1, 2, 4, 8)  # inside a node: what these ranks send each other lies on the critical path
