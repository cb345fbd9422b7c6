"""Fine-tuning on questions, section 4.3 of the BLIP-2 paper: the Q-Former reads the question, too.

B images, Q queries, D width of the language model.
"""

from __future__ import annotations

from typing import Any

from paddle import Tensor

from blip2x.objectives.stage2 import Stage2Objective
from blip2x.objectives.tokens import weighed


class AnsweringObjective(Stage2Objective):
    """Cross-entropy of the answer given [queries that have read the question][prompt with the question]."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """As `Stage2Objective.forward`, with ``question_ids_BK`` and ``question_mask_BK`` for the Q-Former -> ``loss``."""
        patches = self.model.ln_vision(self.model.encoded(batch))
        query_BQD = self.model.encode_asked(patches, batch["question_ids_BK"], batch["question_mask_BK"])
        return {"loss": weighed(self.text_loss(query_BQD, batch), batch)}
