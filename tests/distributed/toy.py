"""A model of half a million parameters and samples for it: every dimension another number, every path alive.

Deepstack lies inside the ViT's depth and adds to three decoder layers, one decoder layer is dense, there are fewer
key/value heads than sequence ranks in the larger meshes, and weights are scaled so that no path fades out.
"""

import torch
from torch import Tensor

from modeling.qwen3_vl_moe import Qwen3VLMoeConfig

PATCH = 4
IMAGE, VIDEO, START, END = 190, 191, 192, 193
VOCABULARY = 198
TEXT = {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 20,
    "hidden_size": 56,
    "intermediate_size": 100,
    "max_position_embeddings": 4096,
    "mlp_only_layers": [2],
    "moe_intermediate_size": 36,
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 3, 3]},
    "vocab_size": VOCABULARY,
    "router_aux_loss_coef": 0.02,
}
VISION = {
    "deepstack_visual_indexes": [0, 1, 3],
    "depth": 4,
    "hidden_size": 80,
    "in_channels": 3,
    "intermediate_size": 88,
    "num_heads": 4,
    "num_position_embeddings": 49,
    "out_hidden_size": 56,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
# Sizes that the fast kernels of a GPU take (heads of 64 and 72, rows of 16 bytes in half precision), else as above.
ALIGNED_TEXT = {
    "head_dim": 64,
    "hidden_size": 96,
    "intermediate_size": 104,
    "moe_intermediate_size": 40,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10]},
    "vocab_size": 200,
}
ALIGNED_VISION = {"hidden_size": 288, "intermediate_size": 296, "out_hidden_size": 96}
PATCH_DIM = 3 * 2 * PATCH * PATCH


def toy_config_dict(aligned: bool = False, **text: object) -> dict:
    """As a config.json would hold it, of the `aligned` sizes or not; `text` overrides fields of the text config."""
    return {
        "text_config": TEXT | (ALIGNED_TEXT if aligned else {}) | text,
        "vision_config": VISION | (ALIGNED_VISION if aligned else {}),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "tie_word_embeddings": False,
    }


def toy_config(aligned: bool = False, **text: object) -> Qwen3VLMoeConfig:
    return Qwen3VLMoeConfig(**toy_config_dict(aligned, **text))


def fill_weights(state: dict[str, Tensor], one_expert: bool = False) -> None:
    """Seeded weights in place, the same for every caller. `one_expert`: all tokens choose experts 0, 1 and 2."""
    generator = torch.Generator().manual_seed(20)
    for name, value in sorted(state.items()):
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 1:
            value.copy_(noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
        elif "embed" in name and "patch_embed" not in name:
            value.copy_(noise)
        else:
            value.copy_(noise / (value[0].numel() if value.ndim == 5 else value.shape[-1]) ** 0.5)
    if one_expert:
        # One channel of the residual stream is large everywhere, and the routers rank the experts by it.
        state["model.language_model.embed_tokens.weight"][:, 0] = 8.0
        state["model.visual.merger.linear_fc2.bias"][0] = 8.0
        for name, value in state.items():
            if name.endswith("mlp.gate.weight"):
                value[:, 0] = torch.linspace(6, -6, len(value))


class SampleMaker:
    """Processor-like inputs from a seed: text tokens, images, and videos with timestamps between their frames."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def text(self, length: int) -> list[int]:
        return torch.randint(1, 180, (length,), generator=self.generator).tolist()

    def patches(self, grid: tuple[int, int, int]) -> Tensor:
        t, h, w = grid
        return torch.randn(t * h * w, PATCH_DIM, generator=self.generator)

    def sample(
        self,
        length: int,
        images: list[tuple[int, int, int]] | None = None,
        videos: list[tuple[int, int, int]] | None = None,
    ) -> dict[str, Tensor]:
        """One sample (batch of one): `length` text tokens with the visuals spread between them."""
        ids: list[int] = self.text(max(length // 3, 1))
        for _, h, w in images or []:
            ids += [START, *[IMAGE] * (h * w // 4), END, *self.text(2)]
        for t, h, w in videos or []:
            for _ in range(t):
                ids += [*self.text(2), START, *[VIDEO] * (h * w // 4), END]
        ids += self.text(max(length - length // 3, 1))
        made = {"input_ids": torch.tensor([ids])}
        if images:
            made["pixel_values"] = torch.cat([self.patches(grid) for grid in images])
            made["image_grid_thw"] = torch.tensor(images)
        if videos:
            made["pixel_values_videos"] = torch.cat([self.patches(grid) for grid in videos])
            made["video_grid_thw"] = torch.tensor(videos)
        return made


TEXT_ONLY = [{"length": n} for n in (9, 14, 6, 11, 17, 5, 8, 12)]
SMALL, WIDE, TALL, LARGE = (1, 4, 4), (1, 4, 8), (1, 6, 2), (1, 8, 10)
CLIP, LONG_CLIP = (2, 4, 4), (3, 2, 6)

# Eight samples a kind; with n data ranks each takes 8 / n neighbours. Images and videos are unlike in number and size.
KINDS: dict[str, list[dict]] = {
    "text": TEXT_ONLY,
    "image": [{"length": 7, "images": [g]} for g in (SMALL, WIDE, TALL, SMALL, LARGE, TALL, WIDE, SMALL)],
    "video": [{"length": 6, "videos": [g]} for g in (CLIP, LONG_CLIP, CLIP, CLIP, LONG_CLIP, CLIP, CLIP, LONG_CLIP)],
    "mixed": [
        {"length": 8, "images": [SMALL, TALL]},
        {"length": 12},
        {"length": 5, "videos": [CLIP]},
        {"length": 9, "images": [WIDE], "videos": [LONG_CLIP]},
        {"length": 6},
        {"length": 10, "videos": [LONG_CLIP]},
        {"length": 7, "images": [LARGE]},
        {"length": 4, "images": [SMALL]},
    ],
    "images on one rank": [
        {"length": 6, "images": [LARGE, SMALL, TALL]},
        {"length": 5, "images": [WIDE]},
        *TEXT_ONLY[2:],
    ],
    "straddling image": [{"length": 5, "images": [LARGE]}, {"length": 4, "images": [(1, 10, 12)]}, *TEXT_ONLY[2:]],
}
KINDS["padded"] = KINDS["mixed"]
KINDS["no label on one rank"] = KINDS["mixed"]
KINDS["one expert"] = KINDS["mixed"]
NAMES = list(KINDS)
# Tokens a data rank packs to, by number of data ranks; the rows of "padded" are shorter by another amount on each rank.
PADDED_LENGTH = {1: 270, 2: 180, 4: 103, 8: 69}


def samples_of(kind: str) -> list[dict[str, Tensor]]:
    """The eight samples of a kind, the same for every caller."""
    maker = SampleMaker(seed=NAMES.index(kind))
    return [maker.sample(**description) for description in KINDS[kind]]


def labels_of(kind: str, index: int, ids: Tensor) -> Tensor:
    """Text is learned, placeholders are not; in one kind the first two samples count for nothing."""
    ignored = (ids == IMAGE) | (ids == VIDEO)
    if kind == "no label on one rank" and index < 2:
        ignored = torch.ones_like(ignored)
    return ids.masked_fill(ignored, -100)
