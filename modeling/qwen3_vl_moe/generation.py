"""What `generate` has to know about images: their rows are not samples, and their positions are three-dimensional."""

from typing import Any

import torch
from transformers.generation import GenerationMixin

from modeling.qwen3_vl_moe.cache_name import CACHE, one_cache

VISUAL_KEYS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


def _tokens_per_grid(grid_thw: torch.Tensor, merge: int) -> list[int]:
    return [t * h * w // merge**2 for t, h, w in grid_thw.tolist()]


def grids_per_sample(tokens_per_sample: list[int], tokens_per_grid: list[int], name: str) -> list[int]:
    """How many of a batch's images (in order) belong to each sample, told from its number of placeholder tokens.

    Raises:
        ValueError: the placeholders do not end where an image ends.
    """
    counts, grids = [], iter(tokens_per_grid)
    for sample, tokens in enumerate(tokens_per_sample):
        count, missing = 0, tokens
        while missing > 0:
            missing -= next(grids, tokens + 1)
            count += 1
        if missing < 0:
            raise ValueError(
                f"sample {sample} has {tokens} {name} placeholder tokens, which its {name}_grid_thw rows do not fill "
                f"exactly (tokens per {name}: {tokens_per_grid}). Pass the grids of all samples, in order."
            )
        counts.append(count)
    return counts


def repeat_samples(rows: torch.Tensor, rows_per_sample: list[int], times: int) -> torch.Tensor:
    """Each sample's block of rows, `times` times in a row, as `repeat_interleave` does with samples."""
    return torch.cat([block for block in rows.split(rows_per_sample) for _ in range(times)])


class VisionGenerationMixin(GenerationMixin):
    """transformers' generation for a model whose samples own images. Mixed in before PreTrainedModel."""

    config: Any
    model: Any
    get_input_embeddings: Any

    def _visual_token_mask(
        self, name: str, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, L) bool: the placeholder tokens of a modality."""
        token_id = getattr(self.config, f"{name}_token_id")
        if inputs_embeds is None:
            return input_ids == token_id
        embedding = self.get_input_embeddings()(torch.tensor(token_id, device=inputs_embeds.device))
        return (inputs_embeds == embedding).all(-1)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        is_first_iteration: bool = False,
        use_cache: bool = True,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step: images go in with the tokens that stand for them, once."""
        cache = one_cache(past_key_values, cache)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
            **{CACHE: cache},
            **kwargs,
        )
        if not use_cache:
            return inputs
        past_length = cache.get_seq_length() if cache is not None else 0
        for name, keys in VISUAL_KEYS.items():
            pixels, grid_thw = (kwargs.get(key) for key in keys)
            if pixels is None or grid_thw is None:
                continue
            if not is_first_iteration:
                inputs |= dict.fromkeys(keys)
            elif past_length:
                inputs |= dict(zip(keys, self._uncached(name, input_ids, pixels, grid_thw, past_length), strict=True))
        return inputs

    def _uncached(
        self, name: str, input_ids: torch.Tensor, pixels: torch.Tensor, grid_thw: torch.Tensor, past_length: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The images whose tokens are not in the cache yet: a second turn brings the whole conversation's again."""
        merge = self.config.vision_config.spatial_merge_size
        columns = self._visual_token_mask(name, input_ids).nonzero()[:, 1]
        sizes = _tokens_per_grid(grid_thw, merge)
        if sum(sizes) != len(columns):
            raise ValueError(
                f"the conversation holds {len(columns)} {name} placeholder tokens, its {name}_grid_thw describes "
                f"{sum(sizes)}; pass the {name}s of the whole conversation, earlier turns included."
            )
        new = [bool((part >= past_length).all()) for part in columns.split(sizes)]
        cut = [
            bool((part >= past_length).any()) != whole for part, whole in zip(columns.split(sizes), new, strict=True)
        ]
        if any(cut):
            raise ValueError(f"the cache of {past_length} tokens ends inside {name} {cut.index(True)}; crop it before.")
        if not any(new):
            return None, None
        patches = [size * merge**2 for size in sizes]
        kept = [part for part, is_new in zip(pixels.split(patches), new, strict=True) if is_new]
        return torch.cat(kept), grid_thw[torch.tensor(new, device=grid_thw.device)]

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """(4, B, L): text positions, then the three rotary ones; remembers rope_deltas for the steps to come."""
        text_positions = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)  # (B, L)
        cache = model_kwargs.get(CACHE)
        past_length = cache.get_seq_length() if cache is not None else 0
        input_ids = model_kwargs.get("input_ids")
        if input_ids is None or input_ids.shape[1] == 0:
            input_ids = inputs_tensor
        is_ids = input_ids.ndim == 2 and not input_ids.is_floating_point()
        grids = {key: model_kwargs.get(key) for _, key in VISUAL_KEYS.values()}
        has_grids = any(grid is not None for grid in grids.values())
        if has_grids and not is_ids:
            raise ValueError("inputs_embeds do not tell where images and videos stand; pass input_ids beside them.")
        visual = is_ids and has_grids
        if (
            past_length
            and self.model.rope_deltas is not None
            and not (visual and self._has_visual(input_ids, past_length))
        ):
            rotary = text_positions + self.model.rope_deltas.to(text_positions.device)
            return torch.cat((text_positions[None], rotary.expand(3, -1, -1)))
        if visual:
            mask = model_kwargs.get("attention_mask")
            rotary, self.model.rope_deltas = self.model.get_rope_index(input_ids, attention_mask=mask, **grids)
        else:
            rotary = text_positions.expand(3, -1, -1)
            self.model.rope_deltas = torch.zeros(input_ids.shape[0], 1, dtype=torch.long, device=input_ids.device)
        return torch.cat((text_positions[None].expand(1, *rotary.shape[1:]), rotary))

    def _has_visual(self, input_ids: torch.Tensor, past_length: int) -> bool:
        new_ids = input_ids[:, past_length:]
        return any(bool(self._visual_token_mask(name, new_ids).any()) for name in VISUAL_KEYS)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Repeat every sample for beams or several replies; a sample's images are repeated as one block."""
        if expand_size == 1:
            return input_ids, model_kwargs
        repeated: dict[str, Any] = {}
        merge = self.config.vision_config.spatial_merge_size
        for name, (pixel_key, grid_key) in VISUAL_KEYS.items():
            pixels, grid_thw = model_kwargs.pop(pixel_key, None), model_kwargs.pop(grid_key, None)
            if pixels is None or grid_thw is None:
                continue
            mask = self._visual_token_mask(name, input_ids, model_kwargs.get("inputs_embeds"))
            tokens = mask.sum(1).tolist()
            grids = grids_per_sample(tokens, _tokens_per_grid(grid_thw, merge), name)
            repeated[grid_key] = repeat_samples(grid_thw, grids, expand_size)
            repeated[pixel_key] = repeat_samples(pixels, [count * merge**2 for count in tokens], expand_size)
        position_ids = model_kwargs.pop("position_ids", None)
        if position_ids is not None:
            batch_dim = position_ids.ndim - 2
            repeated["position_ids"] = position_ids.repeat_interleave(expand_size, dim=batch_dim)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | repeated
