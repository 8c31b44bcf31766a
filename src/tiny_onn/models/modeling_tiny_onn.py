"""The Tiny-ONN transformer: attention and feed-forward blocks made of experts.

Shapes: B batch, T tokens, D hidden size, H query heads, G key/value heads, C head width,
E experts, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from tiny_onn.models.attention import TinyOnnAttention, packed_causal_mask, same_segment
from tiny_onn.models.configuration_tiny_onn import TinyOnnConfig
from tiny_onn.models.experts_backend import IMPLEMENTATIONS, applicable
from tiny_onn.models.layers import TinyOnnDecoderLayer
from tiny_onn.models.positions import (
    TinyOnnRotaryEmbedding,
    can_be_told,
    grid_positions,
    seen_tokens,
    tell_tokens,
)
from tiny_onn.routing import MixtureOfExperts
from tiny_onn.routing.experts import Experts
from tiny_onn.routing.routers import Router, load_balancing_loss


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
        """What is asked for, or our own."""
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
                module.implementation = IMPLEMENTATIONS.get(chosen, "auto")

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
        halts = config.halting and config.num_recurrences > 1
        self.halt_head = nn.Linear(width, 1) if halts else None
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
        asks_tokens = position_ids is None and segment_ids is None and input_ids is not None
        if position_ids is None:
            position_ids = self._positions(input_ids, inputs_embeds, past_key_values, segment_ids)
        causal_mask = self._mask(inputs_embeds, attention_mask, past_key_values, segment_ids)
        hidden_states = inputs_embeds
        for ids, embed in ((task_ids, self.embed_tasks), (symmetry_ids, self.embed_symmetries)):
            if embed is not None:
                hidden_states = _add_embedding(hidden_states, ids, embed)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        # An assistant that exits early is this model with fewer layers by its configuration.
        layers = self.layers[: self.config.num_hidden_layers]
        states = []
        for round_ in range(self.config.num_recurrences):
            for layer in layers:
                hidden_states = layer(
                    hidden_states,
                    position_embeddings=position_embeddings,
                    attention_mask=causal_mask,
                    past_key_values=past_key_values,
                    cache_offset=round_ * len(layers),
                    **kwargs,
                )
            states.append(hidden_states)
        if self.halt_head is not None:
            hidden_states = self._halted(states)
        if asks_tokens and past_key_values is not None and self.config.position_type == "grid":
            assert input_ids is not None
            tell_tokens(past_key_values, input_ids)
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )

    def _halted(self, states: list[Tensor]) -> Tensor:
        """The mixture of what each token was after every application, by where it halts."""
        assert self.halt_head is not None
        answer, left = torch.zeros_like(states[0]), torch.ones_like(states[0][..., :1])
        for state in states[:-1]:
            halts = left * self.halt_head(state).sigmoid()
            answer, left = answer + halts * state, left - halts
        return answer + left * states[-1]

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
        history = seen_tokens(cache, input_ids)
        if history.shape != (batch, seen):
            raise ValueError(
                "The cache was filled by a call that gave its own position_ids, so positions can't "
                "be read off the tokens: give position_ids of shape [3, B, T]"
            )
        return self.token_positions(torch.cat([history, input_ids], dim=1))[..., seen:]


class TinyOnnForCausalLM(TinyOnnPreTrainedModel, GenerationMixin):
    """The model with its language head: next-token logits, loss and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

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
        """The inputs of one step. On a grid the model reads positions off the tokens and those that
        its cache has seen; it is given them if the step may be compiled."""
        on_grid = self.config.position_type == "grid"
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        told = cache is None or (can_be_told(cache) and not cache.is_compileable)
        prompt = mask if inputs_embeds is None else inputs_embeds
        whole = prompt is None or input_ids.shape[1] >= prompt.shape[1]
        given = whole and not (told and inputs_embeds is None)
        if on_grid and given:
            kwargs["position_ids"] = self.model.token_positions(input_ids)
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if on_grid and not given and inputs_embeds is None:
            inputs["position_ids"] = None
        for name in ("task_ids", "symmetry_ids"):
            ids = inputs.get(name)
            if ids is not None and ids.ndim == 2:
                inputs[name] = _latest(ids, input_ids.shape[1], inputs)
        return inputs


def _add_embedding(hidden_states: Tensor, ids: Tensor | None, embed: nn.Embedding) -> Tensor:
    batch, length, _ = hidden_states.shape
    if ids is None:
        # Data parallelism waits for a gradient of every parameter, be it zero.
        return hidden_states + 0.0 * embed.weight.sum() if embed.training else hidden_states
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
