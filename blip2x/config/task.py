"""``task``: what a run does, one dataclass per task of the same name; those that train nothing are in tools.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import List, Optional

from omegaconf import MISSING

from blip2x.config.schema import schema


@dataclass
class TaskConfig:
    """What every task has."""

    kind: str = MISSING


class OnNan(Enum):
    """What becomes of an optimizer step whose loss or gradient is nan or infinite."""

    stop = "stop"  # the run ends with step, loss part and samples
    skip = "skip"  # the step is left out and counted; each step waits for its gradient's norm


class Best(Enum):
    """Which value of a metric is the best one."""

    max = "max"
    min = "min"


@dataclass
class TrainingConfig(TaskConfig):
    """A task that trains. One of max_steps and max_epochs is set, the other is null."""

    batch_size: int = MISSING  # samples per rank and optimizer step's micro-batch
    accumulate: int = MISSING  # micro-batches per optimizer step
    max_steps: Optional[int] = MISSING  # optimizer steps
    max_epochs: Optional[int] = MISSING  # passes over the training samples
    log_every: int = MISSING  # optimizer steps between lines in metrics.jsonl; a checkpoint has a line, too
    eval_every: Optional[int] = MISSING  # optimizer steps between validations; null: only at the end
    eval_batch_size: int = MISSING  # samples per rank at a time where nothing is trained
    on_nan: OnNan = MISSING  # what becomes of a step whose loss or gradient is no finite number
    save_every: Optional[int] = MISSING  # optimizer steps between checkpoints; null: only at the end
    keep_last: int = MISSING  # the newest checkpoints, the one at the end among them
    keep_best: int = MISSING  # the best ones by best_metric, also when they are old
    best_metric: Optional[str] = MISSING  # of the validation; null: none is better than another
    best_is: Best = MISSING  # whether the best value of best_metric is the largest or the smallest
    save_in_background: bool = MISSING  # write checkpoints while the training goes on, from a copy in memory


@dataclass
class ValidationConfig:
    """Captions written for held-out images while a model is trained."""

    captions: bool = MISSING  # write and score them
    max_images: Optional[int] = MISSING  # to caption, and in stage 1 to match: the first to be evaluated on; null: all
    num_beams: int = MISSING  # 1: greedy
    max_new_tokens: int = MISSING  # of a caption, at most
    min_new_tokens: int = MISSING  # of a caption, at least


class WeightsType(Enum):
    """In which type the weights of image encoder and language model are kept where nothing is trained."""

    float32 = "float32"  # as `precision` says
    bfloat16 = "bfloat16"  # two bytes each, brought to the type of the computation when they are used
    int8 = "int8"  # one byte each, and a scale per output


@dataclass
class DecodingConfig(TaskConfig):
    """A task that generates text; lengths count new tokens only."""

    num_beams: int = MISSING  # 1: greedy, or sampling where do_sample is true
    do_sample: bool = MISSING  # draw each token, instead of taking the likeliest
    top_p: float = MISSING  # sampling: smallest set of tokens with this probability; 1: all
    top_k: int = MISSING  # sampling: the k likeliest tokens; 0: all
    temperature: float = MISSING  # sampling: scores are divided by it; below 1: closer to the likeliest
    max_new_tokens: int = MISSING  # at most
    min_new_tokens: int = MISSING  # at least
    length_penalty: float = MISSING  # a beam scores sum of log-probabilities / length ** length_penalty
    repetition_penalty: float = MISSING  # what the scores of tokens that are there already are divided by; 1: none
    num_return_sequences: int = MISSING  # texts per image; of a beam search at most num_beams
    weights_dtype: WeightsType = MISSING  # of image encoder and language model, to fit large ones; float32: as precision says
    early_stopping: bool = MISSING  # stop a beam search when num_beams texts are finished, whatever the others could become


@schema("task", "pretrain_language")
@dataclass
class PretrainLanguageConfig(TrainingConfig):
    """Fit the language model on the data set's text, without any image."""

    kind: str = "pretrain_language"
    max_txt_len: int = MISSING  # tokens of a text; longer ones are cut


@schema("task", "pretrain_vision")
@dataclass
class PretrainVisionConfig(TrainingConfig):
    """Fit the image encoder on the data set's labels (of each patch)."""

    kind: str = "pretrain_vision"


@schema("task", "pretrain_stage1")
@dataclass
class PretrainStage1Config(TrainingConfig):
    """Stage 1: align images and texts by contrast, matching and captioning."""

    kind: str = "pretrain_stage1"
    max_txt_len: int = MISSING  # tokens of a text; longer ones are cut
    itc_weight: float = MISSING  # of the contrastive loss in the sum
    itm_weight: float = MISSING  # of the matching loss in the sum
    lm_weight: float = MISSING  # of the captioning loss in the sum
    contrast_steps: int = MISSING  # optimizer steps with contrast alone, before matching and captioning join in
    label_smoothing: float = MISSING  # of the contrastive loss
    gather_gradient: bool = MISSING  # contrast teaches both sides of a comparison, over all ranks; false: one, as in LAVIS
    cached_contrast: bool = MISSING  # with task.accumulate: contrast and match among all of a step's micro-batches
    validation: ValidationConfig = field(default_factory=ValidationConfig)


class FloatType(Enum):
    """Types in which NumPy holds what a model computed."""

    float32 = "float32"
    float16 = "float16"


@schema("task", "retrieval")
@dataclass
class RetrievalConfig(PretrainStage1Config):
    """Find texts of images and images of texts: by contrast, then the best by matching; fine-tune first where train is true."""

    kind: str = "retrieval"
    train: bool = MISSING  # fine-tune first
    k_test: int = MISSING  # of each image's texts and each text's images, the best ones by contrast that are matched
    eval_max_txt_len: int = MISSING  # of the texts that are searched; max_txt_len is of the training and its validations
    clean_texts: bool = MISSING  # lower case and without most punctuation, as BLIP's training captions
    pair_batch_size: int = MISSING  # texts that are matched with an image at a time
    patch_memory_gb: float = (
        MISSING  # patches kept in memory per rank; where they are more, all are in a file in the run folder
    )
    patch_dtype: FloatType = MISSING  # of the kept patches


@schema("task", "pretrain_stage2")
@dataclass
class PretrainStage2Config(TrainingConfig):
    """Stage 2: teach the frozen language model to read the queries."""

    kind: str = "pretrain_stage2"
    prompt: str = MISSING  # put before each caption and masked in the loss
    max_txt_len: int = MISSING  # tokens of prompt and caption; longer ones are cut
    prefix_split: bool = MISSING  # encoder-decoder models: a random first part of the caption goes to the encoder
    validation: ValidationConfig = field(default_factory=ValidationConfig)


@schema("task", "caption")
@dataclass
class CaptionConfig(TrainingConfig, DecodingConfig):
    """Caption the evaluation images and score the captions; fine-tune first where train is true."""

    kind: str = "caption"
    train: bool = MISSING  # fine-tune first
    prompt: str = MISSING  # how each caption begins, for the model to go on
    max_txt_len: int = MISSING  # training: tokens of prompt and caption; longer ones are cut
    metrics: List[str] = MISSING  # of BLEU, METEOR, ROUGE_L, CIDEr, SPICE
    blind_baseline: bool = MISSING  # also score captions of the language model that sees no image


def trains(task: TaskConfig) -> bool:
    """Whether it changes weights: of those with a training's settings, all but the ones whose `train` is false."""
    return isinstance(task, TrainingConfig) and getattr(task, "train", True)


def weights_dtype(task: TaskConfig) -> WeightsType:
    """How the task keeps image encoder and language model."""
    return task.weights_dtype if isinstance(task, DecodingConfig) else WeightsType.float32


def may_keep_features(task: TaskConfig) -> bool:
    """Whether ``dataset.cache=features`` concerns it: it evaluates or trains what stands behind an image encoder."""
    without = (PretrainVisionConfig, PretrainLanguageConfig)  # which train the encoder, or have none
    return isinstance(task, (TrainingConfig, AnsweringConfig)) and not isinstance(task, without)


class AnswerRules(Enum):
    """Which published evaluation an answer is scored by."""

    vqa = "vqa"  # VQAv2's official program, also for OK-VQA
    vqa_lavis = "vqa_lavis"  # what BLIP-2's published figures were computed by
    gqa = "gqa"  # equal to the only answer
    gqa_lavis = "gqa_lavis"  # equal after both were normalised by the VQA rules
    aokvqa = "aokvqa"  # A-OKVQA's direct answers: min(1, matches / 3)


@dataclass
class AnsweringConfig(DecodingConfig):
    """A task that answers the evaluation questions."""

    eval_batch_size: int = MISSING  # images per rank at a time
    prompt: str = MISSING  # "{}" is replaced by the question
    clean_questions: bool = MISSING  # lower case, none of .!"()*#:;~ and at most 50 words, as in LAVIS's evaluations
    answer_rules: AnswerRules = MISSING  # which published evaluation answers are scored by
    lemmatise: bool = MISSING  # nouns and verbs of answers in their basic form, as LAVIS does for OK-VQA; needs spaCy


@schema("task", "vqa_zeroshot")
@dataclass
class VqaZeroshotConfig(AnsweringConfig):
    """Answer the evaluation questions without having been trained on any."""

    kind: str = "vqa_zeroshot"
    blind_baseline: bool = MISSING  # also answer without the image, and by the commonest answer per question type


@dataclass
class AnswerValidationConfig:
    """Answers to held-out questions while a model is trained."""

    max_images: Optional[int] = MISSING  # to ask about: the first to be evaluated on; null: all
    num_beams: int = MISSING  # 1: greedy


@schema("task", "vqa_finetune")
@dataclass
class VqaFinetuneConfig(TrainingConfig, AnsweringConfig):
    """Answer the evaluation questions, which the Q-Former reads, too; fine-tune on questions first where train is true."""

    kind: str = "vqa_finetune"
    train: bool = MISSING  # fine-tune first
    max_txt_len: int = MISSING  # of the question in the Q-Former; of prompt and answer in the language model
    validation: AnswerValidationConfig = field(default_factory=AnswerValidationConfig)


@dataclass
class StageConfig:
    """One stage of a pipeline: a task as it would be typed alone."""

    task: str = MISSING  # an option of the group task
    name: Optional[str] = None  # key in results.json and folder; null: the task's name
    overrides: List[str] = field(default_factory=list)  # as on the command line, e.g. "optim.lr=1e-4"
    unless: Optional[str] = None  # a key of the config: the stage is left out where that key is set


@schema("task", "pipeline")
@dataclass
class PipelineConfig(TaskConfig):
    """Several tasks in a row; each takes the weights that the ones before it made."""

    kind: str = "pipeline"
    stages: List[StageConfig] = MISSING
    overrides: Optional[List[str]] = MISSING  # of all stages, as on the command line; null: those of this run's command
