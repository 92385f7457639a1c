"""Qwen3-VL-MoE: the whole model in one file, a fork for training.

Module and parameter names are those of transformers' own implementation, so state dicts, adapters and regular
expressions written for it keep working; the code is this project's. It follows the architecture as published with the
Qwen3-VL checkpoints and implemented in transformers, and is proven equal to that implementation, outputs and gradients.

What differs is where training spends its time and where it goes wrong elsewhere:

- packed samples (`cu_seq_lens_q`) go through variable-length attention; no S x S mask exists for them;
- experts are one autograd function over grouped matrix products, on weights (E, 2I, H) and (E, H, I) that no forward
copies;
- everything the vision tower derives from grid_thw comes from the CPU, once per batch (`multimodal_metadata`);
- visual features enter the text by index, not by boolean mask, and the loss never holds the full logits;
- a changed place carries one line `# PATCH(name): why`; the README lists them.

Shape letters: B batch, S full sequence, s this rank's slice, H hidden, D head_dim, N heads, E experts, K top_k, I
expert intermediate, T tokens (B*S flattened), V vocabulary, P vision patches, p this rank's patches, M merged visual
tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, is_torch_npu_available

from modeling.distributed.encoder_data_balance import EncoderDataBalancer
from modeling.distributed.parallel_plan import ParallelPlan
from modeling.distributed.parallel_state import ParallelState, get_parallel_state
from modeling.distributed.sequence_parallel import (
    gather_heads_scatter_seq,
    gather_outputs,
    gather_outputs_with_grad,
    gather_seq_scatter_heads,
    sp_pad_and_slice,
)
from modeling.ops.attention import select_varlen_backend, varlen_attention
from modeling.ops.experts import fused_moe_forward
from modeling.ops.launch import has_hooks, is_plain_linear
from modeling.ops.loss import linear_cross_entropy, load_balancing_loss_func
from modeling.ops.norm_rotary import norm_rotate, rms_norm, rotate, rotate_qkv
from modeling.ops.vision_block import can_fuse, norm_attention, norm_rotated_qkv, project_and_mlp
from modeling.qwen3_vl_moe.cache_name import CACHE, one_cache
from modeling.qwen3_vl_moe.configuration_qwen3_vl_moe import (
    Qwen3VLMoeConfig,
    Qwen3VLMoeTextConfig,
    Qwen3VLMoeVisionConfig,
    check_moe_implementation,
    own_config,
)
from modeling.qwen3_vl_moe.generation import VisionGenerationMixin
from modeling.qwen3_vl_moe.inputs import (
    VisualInput,
    check_attention_mask,
    check_packing,
    check_tokens,
    normalize_position_ids,
)
from modeling.qwen3_vl_moe.parallel_plan import check_parallel_state, get_parallel_plan
from modeling.qwen3_vl_moe.position_ids import get_rope_index, make_position_id_func
from modeling.qwen3_vl_moe.pretrained import LayoutAwareModel
from modeling.qwen3_vl_moe.vision_metadata import (
    VisionMetadata,
    check_token_ids,
    make_metadata_collate_func,
    vision_metadata,
)


class Qwen3VLMoeTextRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in float32 (Zhang & Sennrich, 2019)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class Qwen3VLMoeTextRotaryEmbedding(nn.Module):
    """Interleaved multimodal rotary angles: frequency i turns with the temporal, height or width position.

    The frequencies are no buffer: they are computed on the CPU and cached per device, so that a model built on the meta
    device needs no extra step and every device sees the same bits.
    """

    STATIC_ROPE_TYPES = ("default", "linear", "yarn", "llama3", "proportional")

    def __init__(self, config: Qwen3VLMoeTextConfig) -> None:
        super().__init__()
        parameters = config.rope_parameters
        rope_type = parameters["rope_type"]
        if rope_type not in self.STATIC_ROPE_TYPES:
            raise ValueError(
                f"rope_type={rope_type!r} changes with the sequence length and is not supported; use one of "
                f"{', '.join(self.STATIC_ROPE_TYPES)}."
            )
        if rope_type == "default":
            exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float, device="cpu") / config.head_dim
            inv_freq, self.attention_scaling = 1.0 / parameters["rope_theta"] ** exponents, 1.0
        else:
            inv_freq, self.attention_scaling = ROPE_INIT_FUNCTIONS[rope_type](config, device="cpu")
        self._axis_of_frequency = self._interleave(parameters.get("mrope_section", [24, 20, 20]), len(inv_freq))
        self._inv_freq = inv_freq
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @staticmethod
    def _interleave(sections: list[int], frequencies: int) -> torch.Tensor:
        """0, 1 or 2 (T, H, W) for each frequency: T H W T H W ... as far as the sections of H and W reach, then T."""
        axis = torch.zeros(frequencies, dtype=torch.long, device="cpu")
        axis[1 : 3 * sections[1] : 3] = 1
        axis[2 : 3 * sections[2] : 3] = 2
        return axis

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids (3, B, S) -> cos and sin (B, S, D) in x's dtype and on its device."""
        if x.device not in self._on_device:
            axis = self._axis_of_frequency.to(x.device, non_blocking=True)
            self._on_device[x.device] = (self._inv_freq.to(x.device, non_blocking=True), axis)
        inv_freq, axis = self._on_device[x.device]
        positions = position_ids.movedim(0, -1).index_select(-1, axis)  # (B, S, D/2)
        angles = positions.float() * inv_freq
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((sin, sin), dim=-1).to(x.dtype)


class Qwen3VLMoeTextExperts(nn.Module):
    """The experts of one layer: SwiGLU MLPs as two stacked weights, gate rows before up rows."""

    def __init__(self, config: Qwen3VLMoeTextConfig) -> None:
        super().__init__()
        check_moe_implementation(config.moe_implementation)
        if config.hidden_act != "silu":
            raise ValueError(f"the expert layer computes SwiGLU; hidden_act={config.hidden_act!r} must be 'silu'.")
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.backend = "eager" if config.moe_implementation == "eager" else config.moe_backend

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(T, H), (T, K) int64, (T, K) float -> (T, H)."""
        # PATCH(ep-fused-moe): compact top-k weights go straight to the kernel; expert weights are read as they lie, and
        # tokens travel to the rank that holds them
        return fused_moe_forward(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.gate_up_proj,
            self.down_proj,
            ep_group=get_parallel_state().ep_group,
            backend=self.backend,
        )


class Qwen3VLMoeTextTopKRouter(nn.Module):
    """Softmax over all experts, the top k kept and renormalised."""

    def __init__(self, config: Qwen3VLMoeTextConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.weight = nn.Parameter(torch.zeros(self.num_experts, self.hidden_dim))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(..., H) -> raw logits (T, E), weights (T, K) float32 that sum to 1, expert indices (T, K) int64."""
        router_logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)  # (T, E)
        probabilities = router_logits.softmax(-1, dtype=torch.float)
        weights, indices = probabilities.topk(self.top_k, dim=-1)  # (T, K)
        return router_logits, weights / weights.sum(-1, keepdim=True), indices


class Qwen3VLMoeTextSparseMoeBlock(nn.Module):
    def __init__(self, config: Qwen3VLMoeTextConfig) -> None:
        super().__init__()
        self.experts = Qwen3VLMoeTextExperts(config)
        self.gate = Qwen3VLMoeTextTopKRouter(config)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S, H) -> (B, S, H) and the raw router logits (T, E)."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        router_logits, weights, indices = self.gate(tokens)
        return self.experts(tokens, indices, weights).view_as(hidden_states), router_logits


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, with its weights; transformers' attention interface. (B, N, S, D) -> (B, S, N, D)."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # (B, N, S, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Qwen3VLMoeTextAttention(nn.Module):
    """Grouped-query attention with an RMSNorm on every query and key head."""

    def __init__(self, config: Qwen3VLMoeTextConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        query_size, key_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = Qwen3VLMoeTextRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3VLMoeTextRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int = 0,
        sp_group: dist.ProcessGroup | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, H) -> (B, S, H) and the attention weights where the implementation has them."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self._norm_rotated(self.q_norm, self.q_proj(hidden_states).view(heads), position_embeddings)
        key = self._norm_rotated(self.k_norm, self.k_proj(hidden_states).view(heads), position_embeddings)
        value = self.v_proj(hidden_states).view(heads)  # (B, S, N_kv, D), as key; query (B, S, N, D)
        if cu_seqlens is not None:
            output, weights = self._packed(query, key, value, cu_seqlens, max_seqlen, sp_group), None
        else:
            output, weights = self._masked(query, key, value, attention_mask, past_key_values)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    @staticmethod
    def _norm_rotated(
        norm: nn.Module, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Normalised and turned, (B, S, heads, D), in one kernel unless somebody attached something to the norm."""
        if type(norm) is Qwen3VLMoeTextRMSNorm and not has_hooks(norm):
            return norm_rotate(x, norm.weight, norm.variance_epsilon, *position_embeddings)
        return rotate(norm(x), *position_embeddings)

    def _packed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        sp_group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        """One row of packed samples, each attending to itself: (1, S, N, D) -> (S, N, D)."""
        return varlen_attention(
            query.squeeze(0),
            key.squeeze(0),
            value.squeeze(0),
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            causal=True,
            scale=self.scaling,
            implementation=self.config._attn_implementation,
            group=sp_group,
        )

    def _masked(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Padded batches and generation, through transformers' attention registry."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, N, S, D)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        return attention(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling)


class Qwen3VLMoeTextMLP(nn.Module):
    """The SwiGLU MLP of a dense layer."""

    def __init__(self, config: Qwen3VLMoeTextConfig, intermediate_size: int | None = None) -> None:
        super().__init__()
        intermediate_size = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def is_moe_layer(config: Qwen3VLMoeTextConfig, layer_idx: int) -> bool:
    """Whether a decoder layer has experts rather than a dense MLP."""
    if layer_idx in config.mlp_only_layers or config.num_experts == 0:
        return False
    return (layer_idx + 1) % config.decoder_sparse_step == 0


class Qwen3VLMoeTextDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: Qwen3VLMoeTextConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Qwen3VLMoeTextAttention(config, layer_idx)
        moe = is_moe_layer(config, layer_idx)
        self.mlp = Qwen3VLMoeTextSparseMoeBlock(config) if moe else Qwen3VLMoeTextMLP(config)
        self.input_layernorm = Qwen3VLMoeTextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3VLMoeTextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int = 0,
        sp_group: dist.ProcessGroup | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(B, S, H) -> (B, S, H), raw router logits (T, E) of a MoE layer, attention weights where there are any."""
        attended, attention_weights = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings,
            attention_mask,
            past_key_values=past_key_values,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            sp_group=sp_group,
        )
        hidden_states = hidden_states + attended
        output, router_logits = self.mlp(self.post_attention_layernorm(hidden_states)), None
        if isinstance(output, tuple):
            output, router_logits = output
        return hidden_states + output, router_logits, attention_weights


class Qwen3VLMoePreTrainedModel(LayoutAwareModel):
    config_class = Qwen3VLMoeConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("text", "image", "video")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen3VLMoeTextDecoderLayer", "Qwen3VLMoeVisionBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.get_text_config().initializer_range
        if isinstance(module, Qwen3VLMoeTextExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, Qwen3VLMoeTextTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)


class Qwen3VLMoeVisionRotaryEmbedding(nn.Module):
    """Axial rotary angles: a quarter of the head turns with the patch's row, a quarter with its column, then again."""

    def __init__(self, config: Qwen3VLMoeVisionConfig) -> None:
        super().__init__()
        parameters: dict[str, Any] = config.rope_parameters  # type: ignore[assignment]  # filled in by the config
        if parameters["rope_type"] != "axial":
            raise ValueError(f"the vision tower's rope_type must be 'axial', got {parameters['rope_type']!r}.")
        axis_dim = config.hidden_size // config.num_heads // 2
        exponents = torch.arange(0, axis_dim, 2, dtype=torch.float, device="cpu") / axis_dim
        self._inv_freq = 1.0 / parameters["rope_theta"] ** exponents
        self._on_device: dict[torch.device, torch.Tensor] = {}

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids (P, 2) -> cos and sin (P, D) float32."""
        device = position_ids.device
        if device not in self._on_device:
            self._on_device[device] = self._inv_freq.to(device, non_blocking=True)
        angles = (position_ids[..., None].float() * self._on_device[device]).flatten(1)  # (P, D/2)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class Qwen3VLMoeVisionAttention(nn.Module):
    """Full attention inside each frame."""

    def __init__(self, config: Qwen3VLMoeVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.scaling = self.head_dim**-0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        sp_group: dist.ProcessGroup | None = None,
    ) -> torch.Tensor:
        """(p, H_vit) -> (p, H_vit)."""
        query, key, value = rotate_qkv(self.qkv(hidden_states), *position_embeddings, self.num_heads)  # (p, N, D)
        return self.proj(self.attend(query, key, value, cu_seqlens, max_seqlen, sp_group))

    def runs_flash_attention_4(self, hidden_states: torch.Tensor) -> bool:
        """Whether that is the attention kernel for such hidden states."""
        implementation = self.config._attn_implementation
        return select_varlen_backend(implementation, hidden_states.device, hidden_states.dtype) == "flash_attention_4"

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        sp_group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        """The attention between the two projections: (p, N, D) each -> (p, H_vit)."""
        attended = varlen_attention(
            query,
            key,
            value,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            causal=False,
            scale=self.scaling,
            implementation=self.config._attn_implementation,
            group=sp_group,
        )
        return attended.flatten(1)


class Qwen3VLMoeVisionMLP(nn.Module):
    def __init__(self, config: Qwen3VLMoeVisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=True)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(self.act_fn(self.linear_fc1(hidden_states)))


class Qwen3VLMoeVisionBlock(GradientCheckpointingLayer):
    def __init__(self, config: Qwen3VLMoeVisionConfig, keep_qkv: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.attn = Qwen3VLMoeVisionAttention(config)
        self.mlp = Qwen3VLMoeVisionMLP(config)
        self.is_tanh_gelu = config.hidden_act == "gelu_pytorch_tanh"
        self.keep_qkv = keep_qkv

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        sp_group: dist.ProcessGroup | None = None,
    ) -> torch.Tensor:
        """(p, H_vit) -> (p, H_vit)."""
        attn, mlp = self.attn, self.mlp
        if self.is_tanh_gelu and can_fuse(
            hidden_states, self.norm1, attn.qkv, attn.proj, self.norm2, mlp.linear_fc1, mlp.linear_fc2
        ):
            # PATCH(vit-fused-block): a fifth of the activations kept, half of the launches; the same sums
            qkv = (hidden_states, self.norm1, attn.qkv, *position_embeddings, attn.num_heads)
            if sp_group is None and attn.runs_flash_attention_4(hidden_states):
                options = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "causal": False, "scale": attn.scaling}
                residual, attended = norm_attention(*qkv, self.keep_qkv, **options)
            else:
                residual, query, key, value = norm_rotated_qkv(*qkv)
                attended = attn.attend(query, key, value, cu_seqlens, max_seqlen, sp_group)
            return project_and_mlp(attended, residual, attn.proj, self.norm2, mlp.linear_fc1, mlp.linear_fc2)
        hidden_states = hidden_states + attn(
            self.norm1(hidden_states), cu_seqlens, max_seqlen, position_embeddings, sp_group
        )
        return hidden_states + mlp(self.norm2(hidden_states))


class Qwen3VLMoeVisionPatchProjection(nn.Conv3d):
    """A Conv3d whose kernel is the whole patch, and so a matrix product over flattened patches, which is what runs
    (convolution kernels are 10 to 20 times slower here). Hooks (offloading) and adapters act on it as on any module."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(P, C, T, patch, patch) -> (P, H_vit, 1, 1, 1), in the weight's dtype."""
        pixels = input.flatten(1).to(self.weight.dtype)
        return F.linear(pixels, self.weight.flatten(1), self.bias)[..., None, None, None]


class Qwen3VLMoeVisionPatchEmbed(nn.Module):
    """A patch's pixels to its embedding."""

    def __init__(self, config: Qwen3VLMoeVisionConfig) -> None:
        super().__init__()
        self.patch_shape = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        kernel = self.patch_shape[1:]
        self.proj = Qwen3VLMoeVisionPatchProjection(
            config.in_channels, config.hidden_size, kernel_size=kernel, stride=kernel, bias=True
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(P, C * T * patch * patch) -> (P, H_vit), in the weight's dtype."""
        return self.proj(pixel_values.unflatten(1, self.patch_shape)).flatten(1)


class Qwen3VLMoeVisionPatchMerger(nn.Module):
    """merge² neighbouring patches to one token of the language model's width."""

    def __init__(self, config: Qwen3VLMoeVisionConfig, use_postshuffle_norm: bool = False) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size * config.spatial_merge_size**2
        self.use_postshuffle_norm = use_postshuffle_norm
        self.norm = nn.LayerNorm(self.hidden_size if use_postshuffle_norm else config.hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.hidden_size, self.hidden_size)
        self.act_fn = nn.GELU()
        self.linear_fc2 = nn.Linear(self.hidden_size, config.out_hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(P, H_vit) -> (M, H)."""
        x = self.norm(x.view(-1, self.hidden_size) if self.use_postshuffle_norm else x).view(-1, self.hidden_size)
        return self.linear_fc2(self.act_fn(self.linear_fc1(x)))


@dataclass
class BaseModelOutputWithDeepstackFeatures(BaseModelOutputWithPooling):
    """last_hidden_state (P, H_vit), pooler_output (M, H), and deepstack_features: one (M, H) per deepstack layer."""

    deepstack_features: list[torch.Tensor] | None = None


class Qwen3VLMoeVisionModel(Qwen3VLMoePreTrainedModel):
    config_class = Qwen3VLMoeVisionConfig
    input_modalities = ("image", "video")

    def __init__(self, config: Qwen3VLMoeVisionConfig) -> None:
        super().__init__(config)
        self.spatial_merge_size = config.spatial_merge_size
        self.num_grid_per_side = int(config.num_position_embeddings**0.5)
        self.patch_embed = Qwen3VLMoeVisionPatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.rotary_pos_emb = Qwen3VLMoeVisionRotaryEmbedding(config)
        first_kept = config.depth - config.keep_qkv_blocks
        self.blocks = nn.ModuleList([Qwen3VLMoeVisionBlock(config, i >= first_kept) for i in range(config.depth)])
        self.merger = Qwen3VLMoeVisionPatchMerger(config, use_postshuffle_norm=False)
        self.deepstack_visual_indexes = list(config.deepstack_visual_indexes)
        self.deepstack_merger_list = nn.ModuleList(
            [Qwen3VLMoeVisionPatchMerger(config, use_postshuffle_norm=True) for _ in self.deepstack_visual_indexes]
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_metadata(self, grid_thw: torch.Tensor, patches: int, name: str = "grid_thw") -> VisionMetadata:
        """What `forward` needs to know of a batch's grids (n, 3), worked out on the CPU. `patches` counts those of all
        ranks, padding included."""
        grid_thw = grid_thw.cpu()
        padding = max(patches - int(grid_thw.prod(-1).sum()), 0)
        side, merge = self.num_grid_per_side, self.spatial_merge_size
        return vision_metadata(grid_thw, table_side=side, merge=merge, padding=padding, name=name)

    def dummy_input(self, sp_size: int) -> tuple[torch.Tensor, VisionMetadata]:
        """This rank's patches (merge², C * T * patch * patch), zeros, of an image that gives each rank one token."""
        merge, config = self.spatial_merge_size, self.config
        channels = config.in_channels * config.temporal_patch_size * config.patch_size**2
        pixel_values = torch.zeros(merge**2, channels, dtype=self.dtype, device=self.device)
        return pixel_values, self.get_metadata(torch.tensor([[1, merge * sp_size, merge]]), merge**2 * sp_size)

    def interpolate_pos_embed(self, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Learned positions resampled to each patch: (P, 4), (P, 4) float32 -> (P, H_vit) float32."""
        return (self.pos_embed(indices) * weights[..., None]).sum(1)

    @can_return_tuple
    def forward(
        self,
        hidden_states: torch.Tensor,
        grid_thw: torch.Tensor | None = None,
        metadata: VisionMetadata | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithDeepstackFeatures:
        """Encode patches.

        Args:
            hidden_states: (p, C * T * patch * patch) pixel values in merge-block order, as the image processor gives;
                under sequence parallelism padded to a multiple of merge² x sp and sliced.
            grid_thw: (n, 3) patches in time, height and width per image, whole; not needed when metadata is given.
            metadata: precomputed by `get_metadata` or the collator, whole.

        Returns:
            Features (m, H) of this rank's slice, those of padding included.
        """
        state = get_parallel_state()
        sp_group, patches = state.sp_group, hidden_states.shape[0] * state.sp_size  # P with padding
        if metadata is None:
            if grid_thw is None:
                raise ValueError("the vision tower needs grid_thw (n, 3) or its metadata; got neither.")
            metadata = self.get_metadata(grid_thw, patches)
        unit = self.spatial_merge_size**2 * state.sp_size
        if patches % unit or not metadata.num_patches <= patches < metadata.num_patches + unit:
            raise ValueError(
                f"pixel values hold {patches} patches, but the grids describe {metadata.num_patches}; pass pixel "
                "values and grids of the same images, padded to the next multiple of spatial_merge_size² x sp_size = "
                f"{unit}."
            )
        metadata = metadata.to(hidden_states.device)
        # PATCH(npu-cu-seqlens): torch_npu's attention reads the boundaries on the host
        cu_seqlens = metadata.cu_seqlens.cpu() if is_torch_npu_available() else metadata.cu_seqlens
        interp_indices, interp_weights, position_ids = (
            sp_pad_and_slice(x, dim=0, pad_scale=self.spatial_merge_size**2, group=sp_group)  # (p, …)
            for x in (metadata.interp_indices, metadata.interp_weights, metadata.position_ids)
        )
        hidden_states = self.patch_embed(hidden_states)  # (p, H_vit)
        # PATCH(vit-sp-pos-embed): looked up for this rank's patches only; padding has weight 0
        pos_embeds = self.interpolate_pos_embed(interp_indices, interp_weights)
        hidden_states = hidden_states + pos_embeds.to(hidden_states.dtype)
        # PATCH(vit-sp-rotary-length): positions exist for the cu_seqlens[-1] real patches; padding was appended to them
        # PATCH(vit-sp-rotary-slice): cos and sin come from this rank's positions, in step with its patches
        position_embeddings = self.rotary_pos_emb(position_ids)

        deepstack_features = []
        for layer_idx, block in enumerate(self.blocks):
            hidden_states = block(
                hidden_states,
                cu_seqlens=cu_seqlens,
                max_seqlen=metadata.max_seqlen,
                position_embeddings=position_embeddings,
                sp_group=sp_group,
            )
            if layer_idx in self.deepstack_visual_indexes:
                merger = self.deepstack_merger_list[self.deepstack_visual_indexes.index(layer_idx)]
                deepstack_features.append(merger(hidden_states))
        return BaseModelOutputWithDeepstackFeatures(
            last_hidden_state=hidden_states,
            pooler_output=self.merger(hidden_states),
            deepstack_features=deepstack_features,
        )


class Qwen3VLMoeTextModel(Qwen3VLMoePreTrainedModel):
    """The language model. Not text only: deepstack adds visual features behind its first layers."""

    config_class = Qwen3VLMoeTextConfig
    input_modalities = ("text",)

    def __init__(self, config: Qwen3VLMoeTextConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([Qwen3VLMoeTextDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Qwen3VLMoeTextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3VLMoeTextRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        visual_token_indices: torch.Tensor | None = None,
        deepstack_visual_embeds: Sequence[torch.Tensor] = (),
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids (B, S) or inputs_embeds (B, S, H): exactly one.
            attention_mask: (B, past + S), 0 at padding; or a prepared 4-d mask. Not used with cu_seq_lens_q.
            position_ids: see `normalize_position_ids`; None counts from the cache's length.
            visual_token_indices: (M,) int64 rows of the flattened B*S tokens that are visual.
            deepstack_visual_embeds: one (M, H) per deepstack layer, added behind decoder layers 0, 1, ...
            cu_seq_lens_q: (segments + 1,) int32 boundaries of the samples packed into one row (B = 1).
            max_length_q: the longest of them, a Python int.

        Returns:
            last_hidden_state (B, S, H) after the final norm; hidden_states, attentions and router_logits (raw, (T, E)
            per MoE layer) on request, with upstream's meaning: a layer's own output, deepstack not yet added.
        """
        check_tokens(input_ids, inputs_embeds)
        past_key_values = one_cache(past_key_values, cache)
        state = get_parallel_state()
        if state.sp_enabled and (cu_seq_lens_q is None or position_ids is None):
            raise ValueError(
                f"sp_size={state.sp_size} needs packed samples: cu_seq_lens_q and position_ids, as "
                "SequenceParallelCollator makes them."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, length, _ = inputs_embeds.shape
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seq_lens_q is None
        if use_cache and past_key_values is None and cu_seq_lens_q is None:
            past_key_values = DynamicCache(config=self.config)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            positions = torch.arange(past_length, past_length + length, device=inputs_embeds.device)
            position_ids = positions.expand(4, batch_size, -1)
        position_ids, text_position_ids = normalize_position_ids(
            position_ids, batch_size, length, collated=cu_seq_lens_q is not None
        )

        if cu_seq_lens_q is not None:
            cached = use_cache or past_key_values is not None
            check_packing(batch_size, length * state.sp_size, cached, cu_seq_lens_q, max_length_q)
            attention_mask = None
        else:
            check_attention_mask(attention_mask, batch_size, past_length + length)
            attention_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=text_position_ids,
                **{CACHE: past_key_values},
            )
        hidden_states = inputs_embeds
        # PATCH(sp-local-positions): the collator has sliced the positions, so cos and sin are this rank's as they come
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        all_hidden_states, all_attentions, all_router_logits = [hidden_states], [], []
        for layer_idx, layer in enumerate(self.layers):
            hidden_states, router_logits, attention_weights = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                cu_seqlens=cu_seq_lens_q,
                max_seqlen=max_length_q,
                sp_group=state.sp_group,
            )
            all_hidden_states.append(hidden_states)
            all_attentions.append(attention_weights)
            if router_logits is not None:
                all_router_logits.append(router_logits)
            if visual_token_indices is not None and layer_idx < len(deepstack_visual_embeds):
                hidden_states = add_at(hidden_states, visual_token_indices, deepstack_visual_embeds[layer_idx])
        hidden_states = self.norm(hidden_states)
        return MoeModelOutputWithPast(
            last_hidden_state=hidden_states,
            **{CACHE: past_key_values},
            hidden_states=(*all_hidden_states[:-1], hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
            router_logits=tuple(all_router_logits) if output_router_logits else None,
        )


def add_at(hidden_states: torch.Tensor, token_indices: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """hidden_states (B, S, H) plus embeds (M, H) at rows token_indices (M,) of its B*S tokens."""
    embeds = embeds.to(hidden_states.device, hidden_states.dtype)
    return hidden_states.flatten(0, 1).index_add(0, token_indices, embeds).view_as(hidden_states)


def put_at(hidden_states: torch.Tensor, token_indices: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """hidden_states (B, S, H) with rows token_indices (M,) of its B*S tokens replaced by embeds (M, H)."""
    embeds = embeds.to(hidden_states.device, hidden_states.dtype)
    return hidden_states.flatten(0, 1).index_copy(0, token_indices, embeds).view_as(hidden_states)


class Qwen3VLMoeModel(Qwen3VLMoePreTrainedModel):
    """Vision tower and language model."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: Qwen3VLMoeConfig) -> None:
        config = own_config(config)
        super().__init__(config)
        self.visual = Qwen3VLMoeVisionModel._from_config(config.vision_config)
        self.language_model = Qwen3VLMoeTextModel._from_config(config.text_config)
        self.rope_deltas: torch.Tensor | None = None  # (B, 1), kept for the decoding steps after a prefill
        self.encoder_data_balance: EncoderDataBalancer | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def get_rope_index(
        self,
        input_ids: torch.Tensor,
        mm_token_type_ids: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids.get_rope_index` with this model's numbers: positions (3, B, L) and rope_deltas (B, 1)."""
        return get_rope_index(
            input_ids,
            image_grid_thw,
            video_grid_thw,
            attention_mask,
            mm_token_type_ids,
            spatial_merge_size=self.config.vision_config.spatial_merge_size,
            image_token_id=self.config.image_token_id,
            video_token_id=self.config.video_token_id,
        )

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithDeepstackFeatures:
        """Features of images: pooler_output and each deepstack feature split into one (M_i, H) per image."""
        output = self.visual(pixel_values.to(self.visual.dtype), grid_thw=image_grid_thw)
        sizes = (image_grid_thw.prod(-1) // self.visual.spatial_merge_size**2).tolist()
        output.pooler_output = output.pooler_output.split(sizes)
        output.deepstack_features = [feature.split(sizes) for feature in output.deepstack_features]
        return output

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithDeepstackFeatures:
        """Features of videos; see `get_image_features`."""
        return self.get_image_features(pixel_values_videos, video_grid_thw, **kwargs)

    def compute_3d_position_ids(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        image_grid_thw: torch.Tensor | None,
        video_grid_thw: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past_length: int,
        mm_token_type_ids: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Positions (3, B, S) where the caller gave none: from the grids at a prefill, from the remembered
        rope_deltas when decoding; None (count from the cache's length) for plain text."""
        if input_ids is not None and past_length == 0 and (image_grid_thw is not None or video_grid_thw is not None):
            position_ids, self.rope_deltas = self.get_rope_index(
                input_ids, mm_token_type_ids, image_grid_thw, video_grid_thw, attention_mask
            )
            return position_ids
        if self.rope_deltas is None or (past_length == 0 and input_ids is not None):
            return None
        batch_size, length, _ = inputs_embeds.shape
        if attention_mask is not None and attention_mask.ndim == 2:
            positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)[:, -length:]
        else:
            positions = torch.arange(past_length, past_length + length, device=inputs_embeds.device)
        deltas = self.rope_deltas.repeat_interleave(batch_size // self.rope_deltas.shape[0], dim=0)
        return (positions + deltas.to(inputs_embeds.device)).expand(3, batch_size, -1)

    def _find_placeholders(
        self,
        visual: VisualInput,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        collated: bool,
        state: ParallelState,
    ) -> int:
        """Fill in `visual.token_indices` and, where the sequence is sliced, `visual.token_counts`; how many there
        are."""
        absent = visual.pixel_values is None and visual.mask is None
        if visual.token_indices is None and absent and (collated or state.sp_enabled):
            # No need to search, which would make the host wait: the collator has no placeholders to mark.
            visual.token_indices, visual.token_counts = torch.empty(0, dtype=torch.long), [0] * state.sp_size
        if visual.token_indices is None:
            if visual.mask is not None:
                mask = visual.mask
            elif state.sp_enabled:
                raise ValueError(
                    f"sp_size={state.sp_size}, but the batch has no {visual.name}_mask (1, S); a rank cannot tell from "
                    "its slice of the tokens where the others' features go. Use SequenceParallelCollator."
                )
            elif input_ids is not None:
                mask = input_ids == visual.token_id
            else:
                token_id = torch.tensor(visual.token_id, device=inputs_embeds.device)
                mask = (inputs_embeds == self.get_input_embeddings()(token_id)).all(-1)
            visual.token_indices = mask.flatten().nonzero().squeeze(1)
        if visual.token_counts is None and state.sp_enabled:
            slices = visual.token_indices // inputs_embeds.shape[1]
            visual.token_counts = torch.bincount(slices, minlength=state.sp_size).tolist()
        return len(visual.token_indices)

    def _encode(
        self, visual: VisualInput, state: ParallelState
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
        """Run the vision tower on one modality.

        Returns:
            Features (m, H) of this rank's slice, its deepstack features, and zero as a function of a dummy's features.
        """
        pixel_values, metadata, balancer = visual.pixel_values, visual.metadata, self.encoder_data_balance
        if balancer is not None:
            # PATCH(encoder-data-balance): the exchanges run on every rank; one without images brings no rows
            if pixel_values is None or metadata is None:
                pixel_values, grid_thw = self.visual.dummy_input(state.sp_size)[0][:0], None
            else:
                grid_thw = torch.tensor(metadata.grid_thw)
            pixel_values, grid_thw = balancer.balance_data(pixel_values, grid_thw, visual.name)
            metadata = None
            if len(grid_thw):
                metadata = self.visual.get_metadata(grid_thw, pixel_values.shape[0] * state.sp_size)
        has_images = pixel_values is not None and metadata is not None
        if pixel_values is None or metadata is None:
            # PATCH(fsdp-dummy-vit): a rank without images runs the tower too, or FSDP's collectives would not match
            pixel_values, metadata = self.visual.dummy_input(state.sp_size)
        features = self.visual(pixel_values.to(self.visual.dtype), metadata=metadata)
        embeds, deepstack = features.pooler_output, features.deepstack_features
        zero = None if has_images else 0.0 * torch.stack([x.mean() for x in (embeds, *deepstack)]).sum()
        if balancer is not None:
            embeds, deepstack = balancer.data_bridge(embeds, deepstack, visual.name)
        return embeds, deepstack, zero

    def _fill_back(
        self, visual: VisualInput, inputs_embeds: torch.Tensor, state: ParallelState
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Encode one modality and put its features in place of its placeholder tokens.

        Args:
            inputs_embeds: (B, S, H); under sequence parallelism (1, S, H / sp).

        Returns:
            inputs_embeds, the rows (M,) of this rank's tokens that are visual, and their deepstack features (M, H).
        """
        assert visual.token_indices is not None
        embeds, deepstack, zero = self._encode(visual, state)
        token_indices = visual.token_indices.to(inputs_embeds.device, non_blocking=True)
        # PATCH(vit-lm-fill-back): whole sequence of features, a slice of hidden, like inputs_embeds
        embeds = gather_seq_scatter_heads(embeds, seq_dim=0, head_dim=1, group=state.sp_group)
        inputs_embeds = put_at(inputs_embeds, token_indices, embeds[: len(token_indices)])
        if zero is not None:
            inputs_embeds = inputs_embeds + zero.to(inputs_embeds.dtype)
        if state.sp_enabled and deepstack:
            # PATCH(deepstack-sp): gathered once, not per decoder layer, and with a gradient unless the tower is frozen
            gather = gather_outputs_with_grad if deepstack[0].requires_grad else gather_outputs
            first, count = visual.slice_of(state.sp_rank)
            whole = gather(torch.stack(deepstack), gather_dim=1, group=state.sp_group)  # (layers, M, H)
            deepstack = list(whole[:, first : first + count])
            length = inputs_embeds.shape[1] // state.sp_size
            token_indices = token_indices[first : first + count] - state.sp_rank * length
        return inputs_embeds, token_indices, [feature[: len(token_indices)] for feature in deepstack]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        video_mask: torch.Tensor | None = None,
        multimodal_metadata: dict | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """See `Qwen3VLMoeForConditionalGeneration.forward`."""
        check_tokens(input_ids, inputs_embeds)
        past_key_values = one_cache(past_key_values, cache)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        collated = multimodal_metadata is not None
        if not collated and input_ids is not None and past_length == 0:
            check_token_ids(input_ids, self.config.text_config.vocab_size)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        state = get_parallel_state()
        entries = multimodal_metadata or {}
        inputs = (
            ("image", self.config.image_token_id, pixel_values, image_grid_thw, image_mask),
            ("video", self.config.video_token_id, pixel_values_videos, video_grid_thw, video_mask),
        )
        visuals = [VisualInput.of(*given, entries) for given in inputs]
        run_always = state.fsdp_enabled or self.encoder_data_balance is not None
        if past_length:  # a decoding step: what it sampled is text, whatever the token
            visuals = [visual for visual in visuals if visual.pixel_values is not None]
            if visuals and position_ids is None:
                raise ValueError(
                    f"images or videos behind a cache of {past_length} tokens need position_ids (3, B, S): `generate` "
                    "works them out from the whole conversation, or pass that without a cache."
                )
        for visual in visuals:
            if visual.metadata is None and visual.grid_thw is not None and visual.pixel_values is not None:
                patches = visual.pixel_values.shape[0] * state.sp_size
                visual.metadata = self.visual.get_metadata(visual.grid_thw, patches, f"{visual.name}_grid_thw")
            num_tokens = self._find_placeholders(visual, input_ids, inputs_embeds, collated, state)
            visual.check(num_tokens, self.visual.spatial_merge_size**2)
        visuals = [visual for visual in visuals if run_always or visual.pixel_values is not None]

        token_indices, deepstack = [], []
        if visuals:
            # (1, s, H) -> (1, S, H / sp): a rank's features may belong to any rank's tokens
            inputs_embeds = gather_seq_scatter_heads(inputs_embeds, seq_dim=1, head_dim=2, group=state.sp_group)
            # PATCH(lm-flash-kwargs): the language model's cu_seq_lens and max_length are not among what the ViT gets
            for visual in visuals:
                inputs_embeds, indices, features = self._fill_back(visual, inputs_embeds, state)
                token_indices.append(indices)
                deepstack.append(features)
            inputs_embeds = gather_heads_scatter_seq(inputs_embeds, head_dim=2, seq_dim=1, group=state.sp_group)

        if position_ids is None:
            position_ids = self.compute_3d_position_ids(
                input_ids, inputs_embeds, image_grid_thw, video_grid_thw, attention_mask, past_length, mm_token_type_ids
            )
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            visual_token_indices=torch.cat(token_indices) if token_indices else None,
            deepstack_visual_embeds=[torch.cat(layer) for layer in zip(*deepstack, strict=True)],
            cu_seq_lens_q=cu_seq_lens_q,
            max_length_q=max_length_q,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_router_logits=output_router_logits,
        )


def shift_labels(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """(B, S) labels moved left by one, so that position i holds the token that follows it; the last is ignored."""
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


class Qwen3VLMoeForConditionalGeneration(VisionGenerationMixin, Qwen3VLMoePreTrainedModel):
    """Qwen3-VL-MoE with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    accepts_loss_kwargs = True  # a trainer's num_items_in_batch is the divisor of the loss
    # FSDP gathers each of these for as long as it runs.
    fsdp_modules = (
        "Qwen3VLMoeTextDecoderLayer",
        "Qwen3VLMoeVisionBlock",
        "Qwen3VLMoeVisionPatchMerger",
        "Qwen3VLMoeVisionModel",
    )

    def __init__(self, config: Qwen3VLMoeConfig) -> None:
        config = own_config(config)
        super().__init__(config)
        self.model = Qwen3VLMoeModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithDeepstackFeatures:
        """See `Qwen3VLMoeModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithDeepstackFeatures:
        """See `Qwen3VLMoeModel.get_image_features`."""
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    def get_parallel_plan(self) -> ParallelPlan:
        """Which parameters are cut over expert ranks."""
        return get_parallel_plan()

    def check_parallel_state(self, state: ParallelState) -> None:
        """Raise a ValueError for mesh sizes this model cannot be cut by; see `parallel_plan.check_parallel_state`."""
        check_parallel_state(self.config, state)

    def set_encoder_data_balance(self, balancer: EncoderDataBalancer | None) -> None:
        """Let `balancer` move images between data ranks around the vision tower; None stops it."""
        self.model.encoder_data_balance = balancer

    def get_position_id_func(self) -> Callable[..., dict[str, torch.Tensor]]:
        """A picklable function for data workers; see `position_ids.make_position_id_func`."""
        return make_position_id_func(self.config.vision_config.spatial_merge_size)

    def get_metadata_collate_func(self) -> Callable[[dict, dict[str, int]], None]:
        """A picklable function for the collator; see `vision_metadata.collate_vision_metadata`."""
        vision = self.config.vision_config
        vocab_size = self.config.text_config.vocab_size
        return make_metadata_collate_func(vision.num_position_embeddings, vision.spatial_merge_size, vocab_size)

    def _balancing_loss(
        self,
        router_logits: tuple[torch.Tensor, ...],
        attention_mask: torch.Tensor | None,
        length: int,
        tail_padding_length: int,
        state: ParallelState,
    ) -> torch.Tensor:
        """The load-balancing loss of raw router logits, (T, E) per layer. Without padding: the mask's (B, S), or that
        at a packed row's end, of which `length` tokens are this rank's."""
        if tail_padding_length or state.sp_enabled:
            real = length * (state.sp_size - state.sp_rank) - tail_padding_length
            router_logits, attention_mask = tuple(logits[: max(real, 0)] for logits in router_logits), None
        config = self.config.text_config
        return load_balancing_loss_func(
            router_logits, config.num_experts, config.num_experts_per_tok, attention_mask, group=state.world_group
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_router_logits: bool | None = None,
        tail_padding_length: int = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """One forward pass.

        Args:
            input_ids: (B, S) int64, or inputs_embeds (B, S, H).
            attention_mask: (B, past + S), 0 at padding on either side. Packed batches are told apart by cu_seq_lens_q.
            position_ids: (3, B, S); (B, S), (4, B, S) and a collator's (B, 3, S) are understood; computed when None.
            pixel_values, pixel_values_videos: (P, C * T * patch * patch), with image_grid_thw, video_grid_thw (n, 3).
            mm_token_type_ids: (B, S) from the processor; derived from the token ids when None.
            image_mask, video_mask: (B, S) bool, where the features go, when input_ids no longer tell.
            cu_seq_lens_q, max_length_q: boundaries (segments + 1,) int32 of samples packed into one row, and the
                longest.
            multimodal_metadata: from the collator; without it the forward works it out.
            labels: (B, S), -100 ignored; position i is the token at i, or the one after it with labels_shifted=True.
            shift_labels: (B, S), what labels are once shifted, in their place where both are given.
            num_items_in_batch: divisor of the summed loss; None divides by the number of valid labels, over all ranks.
            logits_to_keep: logits for the last n positions only, or for the given indices; 0 keeps all.
            output_router_logits: return raw router logits and the load-balancing loss, which joins the loss.
            tail_padding_length: tokens at the end of a packed row that are padding (the collator's count).
            num_valid_labels: how many predictions of this rank count (the collator's count).
            cache: another name of past_key_values.

        Returns:
            In training mode with labels: the loss, and no logits (they are never held at once; but where somebody
            attached something to the head). Otherwise logits (B, S, V), and the loss with labels. With several ranks
            losses are this rank's share: their sum is the loss of all tokens. Under sequence parallelism everything
            else is this rank's slice.

        Raises:
            ValueError: inputs that do not fit together; the message says what came and what was expected.
        """
        # Not by name: transformers' Trainer takes every argument that says "label" for one of the data's.
        labels_shifted, num_valid_labels = kwargs.pop("labels_shifted", False), kwargs.pop("num_valid_labels", None)
        shifted = kwargs.pop("shift_labels", None)
        if labels is not None and shifted is not None:
            labels, labels_shifted = shifted, True
        state = get_parallel_state()
        text_config = self.config.text_config
        if output_router_logits is None:
            output_router_logits = text_config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state  # (B, S, H)

        loss, logits = None, None
        if labels is not None:
            if labels.shape != hidden_states.shape[:2]:
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)}, expected the tokens' {tuple(hidden_states.shape[:2])}."
                )
            # Under sequence parallelism labels always come shifted: the next token may lie on another rank.
            targets = labels if labels_shifted or state.sp_enabled else shift_labels(labels)
            if num_items_in_batch is None and state.world_group is not None:
                num_items_in_batch = (targets != -100).sum()
                dist.all_reduce(num_items_in_batch, group=state.world_group)
        if labels is not None and self.training and is_plain_linear(self.lm_head):
            loss = linear_cross_entropy(
                hidden_states.flatten(0, 1),
                self.lm_head.weight,
                targets.flatten(),
                num_items=num_items_in_batch,
                num_valid=num_valid_labels,
                chunk_size=text_config.loss_chunk_size,
            )
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, keep])
            if labels is not None:
                loss = full_logits_loss(logits, targets[:, keep], num_items_in_batch)

        aux_loss = None
        if output_router_logits and outputs.router_logits:
            length = hidden_states.shape[1]
            aux_loss = self._balancing_loss(outputs.router_logits, attention_mask, length, tail_padding_length, state)
            if loss is not None:
                loss = loss + text_config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def full_logits_loss(
    logits: torch.Tensor, targets: torch.Tensor, num_items_in_batch: int | torch.Tensor | None
) -> torch.Tensor:
    """Cross-entropy of logits (B, S, V) in float32 against aligned targets (B, S); the reference of the chunked
    loss."""
    logits, targets = logits.float().flatten(0, 1), targets.flatten().to(logits.device)
    if num_items_in_batch is None:
        return F.cross_entropy(logits, targets)
    return F.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


Qwen3VLMoeForCausalLM = Qwen3VLMoeForConditionalGeneration

__all__ = [
    "Qwen3VLMoeForCausalLM",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3VLMoeModel",
    "Qwen3VLMoePreTrainedModel",
    "Qwen3VLMoeTextModel",
    "Qwen3VLMoeVisionModel",
]
