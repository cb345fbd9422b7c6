"""How to decode: the options of the tasks that generate, checked."""

from __future__ import annotations

from dataclasses import dataclass, fields

from blip2x.config.task import DecodingConfig
from blip2x.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """The meaning of each option stands in ``DecodingConfig``; lengths count new tokens, the end token included.

    Raises:
        UserError: a value is out of its range, or two of them exclude each other.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    num_beams: int = 1
    do_sample: bool = False
    top_p: float = 1.0
    top_k: int = 0
    temperature: float = 1.0
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    early_stopping: bool = False

    def __post_init__(self):
        for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("temperature", "repetition_penalty"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(f"min_new_tokens must lie in 0 to max_new_tokens={self.max_new_tokens}, got {self.min_new_tokens}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"top_k must be at least 0 (0 keeps all tokens), got {self.top_k}")
        if not isinstance(self.early_stopping, bool):
            raise UserError(f"early_stopping must be true or false, got {self.early_stopping!r}")
        self._check_number_of_texts()

    def _check_number_of_texts(self) -> None:
        wanted = self.num_return_sequences
        if self.num_beams > 1 and wanted > self.num_beams:
            raise UserError(f"num_return_sequences={wanted} is more than num_beams={self.num_beams} can return")
        if self.num_beams == 1 and not self.do_sample and wanted > 1:
            raise UserError(f"greedy decoding has one result, not num_return_sequences={wanted}: use beams or do_sample=true")

    @classmethod
    def from_config(cls, cfg: DecodingConfig) -> GenerationSettings:
        """Take the options of the same names from a task's config."""
        return cls(**{field.name: getattr(cfg, field.name) for field in fields(cls)})
