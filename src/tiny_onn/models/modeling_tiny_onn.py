"""The Tiny-ONN transformer: attention and feed-forward blocks made of experts.

Shapes: B batch, T tokens, D hidden size, H query heads, G key/value heads, C head width,
E experts, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from tiny_onn.models.attention import TinyOnnAttention, packed_causal_mask, same_segment
from tiny_onn.models.configuration_tiny_onn import TinyOnnConfig
from tiny_onn.models.experts_backend import IMPLEMENTATIONS, applicable
from tiny_onn.models.positions import TinyOnnRotaryEmbedding, grid_positions
from tiny_onn.routing import ROUTERS, GroupedExperts, MixtureOfExperts, SharedExpert
from tiny_onn.routing.experts import Experts
from tiny_onn.routing.routers import Router, load_balancing_loss


class TinyOnnDecoderLayer(GradientCheckpointingLayer):
    """Attention, then experts, each on the normalised stream and added back to it."""

    def __init__(self, config: TinyOnnConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = TinyOnnAttention(config, layer_idx)
        shared = config.shared_expert_intermediate_size
        self.mlp = MixtureOfExperts(
            ROUTERS[config.router](config.hidden_size, config.num_experts),
            GroupedExperts(
                config.num_experts,
                config.hidden_size,
                intermediate_size=config.moe_intermediate_size,
            ),
            config.num_experts_per_tok,
            SharedExpert(config.hidden_size, shared) if shared else None,
            selection_bias=config.router_selection_bias,
        )
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_dropout = float(config.hidden_dropout)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map ``[B, T, D]`` to ``[B, T, D]``."""
        mixed, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self._drop(mixed)
        computed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self._drop(computed)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.hidden_dropout, self.training) if self.hidden_dropout else x


class TinyOnnPreTrainedModel(PreTrainedModel):
    """What the library asks of every model: its capabilities and its initialisation."""

    config_class = TinyOnnConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TinyOnnDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_set_experts_implementation_cached_value = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(Router, index=0),
        "hidden_states": TinyOnnDecoderLayer,
        "attentions": OutputRecorder(TinyOnnAttention, index=1),
    }

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """One of :data:`~tiny_onn.models.experts_backend.IMPLEMENTATIONS`."""
        return applicable(requested_experts)

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """Compute all experts, those of attention too, with one implementation."""
        super().set_experts_implementation(experts_implementation)
        self._apply_experts_implementation()

    def post_init(self) -> None:
        super().post_init()
        self._apply_experts_implementation()

    def _apply_experts_implementation(self) -> None:
        chosen = applicable(getattr(self.config, "_experts_implementation", None))
        for module in self.modules():
            if isinstance(module, Experts):
                module.implementation = IMPLEMENTATIONS[chosen]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (Experts, Router)):
            module.reset_parameters()
        elif isinstance(module, MixtureOfExperts) and module.selection_bias is not None:
            nn.init.zeros_(module.selection_bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)


class TinyOnnModel(TinyOnnPreTrainedModel):
    """The stack of blocks between token embedding and final norm."""

    def __init__(self, config: TinyOnnConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.embed_tasks = nn.Embedding(config.num_tasks, width) if config.num_tasks else None
        self.embed_symmetries = (
            nn.Embedding(config.num_symmetries, width) if config.num_symmetries else None
        )
        self.layers = nn.ModuleList(
            TinyOnnDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        # Adaptive computation time (arXiv:1603.08983), with PonderNet's mixture (arXiv:2107.05407):
        # a token that has halted still goes on, so that its keys and values are there for others.
        self.halt_head = nn.Linear(width, 1) if config.halting else None
        self.rotary_emb = TinyOnnRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def experts_per_site(self) -> list[int]:
        """K of each site, in the order of ``router_logits``: blocks in turn, attention first, and
        all of them again for each application of the stack."""
        sites = (m for m in self.modules() if isinstance(m, MixtureOfExperts))
        return [m.num_experts_per_tok for m in sites] * self.config.num_recurrences

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        task_ids: Tensor | None = None,
        symmetry_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states ``[B, T, D]`` of tokens ``[B, T]``.

        Args:
            position_ids: ``[3, B, T]`` (row, column, grid) or ``[B, T]``; by default they are read
                off the tokens (``position_type="grid"``) or counted from 0.
            task_ids, symmetry_ids: ``[B]`` or ``[B, T]``; rows of their embeddings, added to every
                token's. None adds nothing.
            segment_ids: ``[B, T]``, the sequence each token of a packed row belongs to: tokens
                attend within their segment only, and grid positions start again with it.

        Raises:
            ValueError: unless exactly one of ``input_ids`` and ``inputs_embeds`` is given; if
                ``task_ids``, ``symmetry_ids`` or ``position_ids`` have another shape; if
                ``segment_ids`` meet a cache that is not empty.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if segment_ids is not None and past_key_values is not None:
            seen = int(past_key_values.get_seq_length())
            if seen:
                raise ValueError(f"segment_ids need an empty cache. Got one of {seen} tokens")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self._positions(input_ids, inputs_embeds, past_key_values, segment_ids)
        causal_mask = self._mask(inputs_embeds, attention_mask, past_key_values, segment_ids)
        hidden_states = inputs_embeds
        for ids, embed in ((task_ids, self.embed_tasks), (symmetry_ids, self.embed_symmetries)):
            if ids is not None and embed is not None:
                hidden_states = _add_embedding(hidden_states, ids, embed)
        position_embeddings = self.rotary_emb(self._axes(position_ids), hidden_states.dtype)
        answer, left = torch.zeros_like(hidden_states), torch.ones_like(hidden_states[..., :1])
        for round_ in range(self.config.num_recurrences):
            for layer in self.layers:
                hidden_states = layer(
                    hidden_states,
                    position_embeddings=position_embeddings,
                    attention_mask=causal_mask,
                    past_key_values=past_key_values,
                    cache_offset=round_ * len(self.layers),
                    **kwargs,
                )
            if self.halt_head is not None:
                last = round_ == self.config.num_recurrences - 1
                halts = left if last else left * self.halt_head(hidden_states).sigmoid()
                answer, left = answer + halts * hidden_states, left - halts
        if self.halt_head is not None:
            hidden_states = answer
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )

    def _mask(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        segment_ids: Tensor | None,
    ) -> Any:
        """The mask in the form that the attention implementation takes."""
        attention = self.config._attn_implementation
        plain = attention_mask is None and cache is None and attention in ("eager", "sdpa")
        if segment_ids is not None and plain:
            return packed_causal_mask(segment_ids, additive=attention == "eager")
        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=cache,
            and_mask_function=None if segment_ids is None else same_segment(segment_ids),
        )

    def token_positions(self, input_ids: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """Positions ``[3, B, T]`` of whole sequences of tokens ``[B, T]`` (see
        :func:`~tiny_onn.models.positions.grid_positions`)."""
        config = self.config
        return grid_positions(
            input_ids,
            row_end_token_id=config.row_end_token_id,
            grid_token_ids=config.grid_token_ids,
            blank_token_ids=config.blank_token_ids,
            segment_ids_BT=segment_ids,
        )

    def _positions(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        cache: Cache | None,
        segment_ids: Tensor | None,
    ) -> Tensor:
        """Positions of the new tokens, from the tokens; a cache remembers those it has seen."""
        batch, length, _ = inputs_embeds.shape
        seen = 0 if cache is None else int(cache.get_seq_length())
        if self.config.position_type == "sequence" or input_ids is None:
            steps = torch.arange(seen, seen + length, device=inputs_embeds.device)
            return steps.expand(batch, length)
        if cache is None or segment_ids is not None:
            return self.token_positions(input_ids, segment_ids)
        history = getattr(cache, "seen_input_ids", input_ids[:, :0])
        if history.shape != (batch, seen):
            raise ValueError(
                "The cache was filled by a call that gave its own position_ids (or was reordered), "
                "so positions can't be read off the tokens: give position_ids of shape [3, B, T]"
            )
        cache.seen_input_ids = torch.cat([history, input_ids], dim=1)
        return self.token_positions(cache.seen_input_ids)[..., seen:]

    def _axes(self, position_ids: Tensor) -> Tensor:
        """Positions as ``[axes, B, T]``; a single axis stands for the columns of a grid model."""
        axes = len(self.rotary_emb.pairs_per_axis)
        if position_ids.ndim == 3 and len(position_ids) == axes:
            return position_ids
        if position_ids.ndim != 2:
            raise ValueError(
                f"position_ids must have shape [B, T] or [{axes}, B, T] with position_type="
                f"{self.config.position_type!r}. Got {list(position_ids.shape)}"
            )
        if axes == 1:
            return position_ids[None]
        zeros = torch.zeros_like(position_ids)
        return torch.stack([zeros, position_ids, zeros])


class TinyOnnForCausalLM(TinyOnnPreTrainedModel, GenerationMixin):
    """The model with its language head: next-token logits, loss and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TinyOnnConfig) -> None:
        super().__init__(config)
        self.model = TinyOnnModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        task_ids: Tensor | None = None,
        symmetry_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits ``[B, T, V]`` (or of the last ``logits_to_keep`` tokens), and the loss for
        ``labels [B, T]`` (shifted inside, -100 is ignored); see :class:`TinyOnnModel`."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if output_router_logits and self.config.router_aux_loss_coef:
            self._refuse_reentrant_checkpoints()
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            task_ids=task_ids,
            symmetry_ids=symmetry_ids,
            segment_ids=segment_ids,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        if output_router_logits and self.config.router_aux_loss_coef:
            counts = None
            if attention_mask is not None and attention_mask.ndim == 2:
                # With a cache the mask also covers tokens whose routes were decided earlier.
                counts = attention_mask[:, -outputs.last_hidden_state.shape[1] :]
            aux_loss = load_balancing_loss(
                outputs.router_logits, self.model.experts_per_site, counts
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def _refuse_reentrant_checkpoints(self) -> None:
        layer = self.model.layers[0]
        checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
        reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant", False)
        if reentrant and layer.gradient_checkpointing and self.training:
            raise ValueError(
                "Re-entrant gradient checkpointing cuts router logits off from the graph, so that "
                "router_aux_loss_coef would do nothing: gradient_checkpointing_enable("
                "{'use_reentrant': False})"
            )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Add the positions that follow from all tokens so far; the library slices them."""
        if self.config.position_type == "grid" and inputs_embeds is None:
            kwargs["position_ids"] = self.model.token_positions(input_ids)
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        for name in ("task_ids", "symmetry_ids"):
            ids = inputs.get(name)
            if ids is not None and ids.ndim == 2:
                inputs[name] = _latest(ids, input_ids.shape[1], inputs)
        return inputs


def _add_embedding(hidden_states: Tensor, ids: Tensor, embed: nn.Embedding) -> Tensor:
    batch, length, _ = hidden_states.shape
    if ids.shape not in ((batch,), (batch, length)):
        raise ValueError(
            f"task_ids and symmetry_ids must have shape [{batch}] or [{batch}, {length}]. "
            f"Got {list(ids.shape)}"
        )
    embedded = embed(ids)
    return hidden_states + (embedded[:, None] if ids.ndim == 1 else embedded)


def _latest(ids: Tensor, length: int, inputs: dict[str, Any]) -> Tensor:
    """The ids of the step's tokens, from those of the prompt; a new token takes the last one's."""
    tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    ids = torch.cat([ids, ids[:, -1:].expand(-1, length - ids.shape[1])], dim=1)
    return ids[:, length - tokens.shape[1] :]
