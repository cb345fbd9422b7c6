"""A real, tiny stage 1 and pairs for it."""

from __future__ import annotations

from collections.abc import Callable

import paddle
import pytest

from blip2x.models.assemblies.stage1 import Stage1Model
from blip2x.models.freeze import freeze
from blip2x.models.qformer.qformer import QFormer
from blip2x.models.vision.eva_vit import EvaVit

LENGTHS = [3, 6, 4, 6, 2, 3, 6, 5]


@pytest.fixture(scope="session")
def build() -> Callable[..., Stage1Model]:
    """A stage-1 model of 20 words, the last of them [DEC], whose features differ as those of a trained one do."""

    def make(*, frozen: bool = True, dropout: float = 0.0) -> Stage1Model:
        paddle.seed(0)
        sizes = {"image_size": 8, "patch_size": 4, "width": 8, "depth": 2, "num_heads": 2, "mlp_width": 12}
        vision = EvaVit(**sizes, drop_path_rate=dropout, recompute=False)
        sizes = {"num_queries": 3, "width": 12, "depth": 2, "num_heads": 2, "mlp_width": 16, "cross_attention_every": 2}
        qformer = QFormer(**sizes, vision_width=8, dropout=dropout, vocab_size=20, max_positions=8)
        model = Stage1Model(vision, qformer, embed_dim=6, ln_vision_eps=1e-5, temperature=0.3)
        for parameter in model.parameters():
            if parameter is not model.temp:
                parameter.set_value(parameter + 0.2 * paddle.randn(parameter.shape))
        if frozen:
            freeze(vision)
        return model

    return make


@pytest.fixture
def pairs() -> dict[str, paddle.Tensor]:
    """Eight pairs with captions of different lengths; images 1 and 5 are the same."""
    paddle.seed(1)
    mask = (paddle.arange(6).unsqueeze(0) < paddle.to_tensor(LENGTHS).unsqueeze(1)).astype("int64")
    ids = paddle.randint(1, 19, [len(LENGTHS), 6]) * mask
    return {
        "image_BCHW": paddle.randn([len(LENGTHS), 3, 8, 8]),
        "image_id_B": paddle.to_tensor([0, 1, 2, 3, 4, 1, 6, 7]),
        "text_ids_BL": ids,
        "text_mask_BL": mask,
    }
