"""``model``: the image encoder, the Q-Former and the language model, and where their weights come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from omegaconf import MISSING

from blip2x.config.schema import schema

LN_VISION_EPS = 1e-5  # in LAVIS's models, and where nothing says otherwise


@dataclass
class VisionConfig:
    """An image encoder: images [B, 3, S, S] -> patch features [B, 1 + (S / patch)^2, width], class token first."""

    kind: str = MISSING  # eva_vit | clip_vit
    image_size: int = MISSING  # pixels, square; positions are interpolated to it when the weights have another size
    patch_size: int = MISSING  # pixels, square; image_size is a multiple of it
    width: int = MISSING  # of the features
    depth: int = MISSING  # blocks that are kept; BLIP-2 drops the last one of the published encoder
    num_heads: int = MISSING  # of attention; width is a multiple of it
    mlp_width: int = MISSING  # of the hidden layer of each feed-forward
    drop_path_rate: float = MISSING  # stochastic depth of the last block, rising linearly from 0; acts only when trained
    frozen: bool = MISSING  # not trained: no gradient, no dropout, not in checkpoints
    recompute: bool = MISSING  # trade a second forward pass for activation memory when the encoder is trained
    weights: Optional[str] = MISSING  # a name or path, as model.weights; null: random, so that it has to be trained


@schema("model/vision", "eva_vit")
@dataclass
class EvaVitConfig(VisionConfig):
    """EVA-CLIP's ViT: biases on queries and values, no norm before or after the blocks, exact GELU."""

    kind: str = "eva_vit"
    key_bias: bool = MISSING  # keys, too; it changes no output, but files that have one come back whole


@schema("model/vision", "clip_vit")
@dataclass
class ClipVitConfig(VisionConfig):
    """OpenAI CLIP's ViT: a norm before the blocks, no bias in the patch projection, QuickGELU."""

    kind: str = "clip_vit"


@schema("model/qformer", "qformer")
@dataclass
class QFormerConfig:
    """The querying transformer: BERT with learned queries and cross-attention to the image every few layers."""

    num_queries: int = MISSING  # learned vectors, which are what the language model reads of an image
    width: int = MISSING  # of queries and texts
    depth: int = MISSING  # layers
    num_heads: int = MISSING  # of attention; width is a multiple of it
    mlp_width: int = MISSING  # of the hidden layer of each feed-forward
    cross_attention_every: int = MISSING  # layers 0, n, 2n, ... look at the image
    vocab_size: Optional[int] = MISSING  # [DEC] included; null: the tokenizer's size
    max_positions: int = MISSING  # tokens of a text, at most
    dropout: float = MISSING  # while it is trained
    embed_dim: int = MISSING  # width of the space in which images and texts are contrasted
    recompute: bool = MISSING  # as in vision
    tokenizer: str = MISSING  # "dataset" (trained from the data set's text), a folder, or a name below paths.weights
    # a BERT to start stage 1 from, a name or path; null: random. For vqa_finetune also weights of stage 1, where model.weights,
    # which are of stage 2, lack what reads texts
    weights: Optional[str] = MISSING


@dataclass
class LanguageConfig:
    """A language model that reads the queries' projections as soft prompt."""

    kind: str = MISSING  # opt | t5
    width: int = MISSING  # of the hidden states
    num_heads: int = MISSING  # of attention
    mlp_width: int = MISSING  # of the hidden layer of each feed-forward
    vocab_size: Optional[int] = MISSING  # null: the tokenizer's size
    dropout: float = MISSING  # acts only where the model itself is fitted (pretrain_language)
    frozen: bool = MISSING  # not trained: no gradient, no dropout, not in checkpoints
    recompute: bool = MISSING  # as in vision; also of a frozen one, since gradients go through it
    question_prompt: str = MISSING  # how this model is asked; "{}" is replaced by the question
    tokenizer: str = MISSING  # as in qformer
    weights: Optional[str] = MISSING  # a name or path, as model.weights


@schema("model/language", "opt")
@dataclass
class OptConfig(LanguageConfig):
    """OPT: decoder only, pre-norm, learned positions."""

    kind: str = "opt"
    depth: int = MISSING  # layers
    max_positions: int = MISSING  # queries, prompt and new tokens together, at most


class Activation(Enum):
    """The gate's activation in T5's feed-forward."""

    gelu = "gelu"  # exact (erf): what LAVIS sets for BLIP-2
    gelu_tanh = "gelu_tanh"  # what FlanT5's own configuration says


@schema("model/language", "t5")
@dataclass
class T5Config(LanguageConfig):
    """T5 1.1 / FlanT5: encoder-decoder, gated feed-forward, relative positions, untied head."""

    kind: str = "t5"
    encoder_depth: int = MISSING  # layers
    decoder_depth: int = MISSING  # layers
    head_width: int = MISSING  # width of one attention head; heads x head_width may differ from width
    relative_buckets: int = MISSING  # of distances between positions
    relative_max_distance: int = MISSING  # tokens; all beyond share a bucket
    activation: Optional[Activation] = MISSING  # null: as the weights' origin computes it, the exact one where nothing says


class Missing(Enum):
    """What is done about tensors that a checkpoint should have and has not."""

    error = "error"
    initialise = "initialise"  # random ones, to be trained: as stage 1 from stage-2 files, which lack what reads texts


@schema("model", "blip2")
@dataclass
class ModelConfig:
    """A whole BLIP-2. Stage 1 uses vision and qformer, stage 2 and the tasks after it use all three."""

    name: str = MISSING  # the option's name: goes into run names and reports
    vision: VisionConfig = field(default_factory=VisionConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    ln_vision_eps: Optional[float] = MISSING  # null: as the weights' origin, 1e-6 in Hugging Face's, else 1e-5
    temperature: float = MISSING  # start of the learned contrast temperature
    missing: Missing = MISSING  # what becomes of parts of the Q-Former that the weights lack
    weights: Optional[str] = MISSING  # a name or path: Hugging Face, LAVIS, PaddleMIX or blip2x; frozen parts may be absent
