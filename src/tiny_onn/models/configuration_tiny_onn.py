"""The configuration of a Tiny-ONN model: the library's field names, plus a few of ours.

Annotations are evaluated here (no ``from __future__``): ``strict`` checks only types it can see.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LEAST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_experts": 1,
    "moe_intermediate_size": 1,
    "shared_expert_intermediate_size": 0,
    "num_recurrences": 1,
    "num_tasks": 0,
    "num_symmetries": 0,
}
"""The least value of each size."""


@strict
class TinyOnnConfig(PreTrainedConfig):
    """Sizes and switches of a Tiny-ONN model; every default makes a small working model.

    Attributes:
        vocab_size: number of tokens; the ARC vocabulary has 16.
        hidden_size: D, width of the residual stream.
        num_hidden_layers: number of blocks (attention, then experts).
        num_attention_heads: H; the head width is ``head_dim``, by default D / H, and even.
        num_key_value_heads: heads of the keys and values, by default as many as one attention
            expert has query heads.
        num_experts: E, experts of every routed projection.
        num_experts_per_tok: K, experts computed for each token; an attention expert has H / K of
            the query heads.
        moe_intermediate_size: width of one SwiGLU expert.
        shared_expert_intermediate_size: width of a SwiGLU expert that computes every token beside
            the chosen ones, 0 for none.
        router_selection_bias: whether each site keeps a bias that counts in the choice of its
            experts only, for the shaping strategy ``"bias"``.
        router: which router chooses the experts, a key of ``tiny_onn.routing.ROUTERS``.
        position_type: ``"grid"`` rotates queries and keys by (row, column, grid), which follow
            from the tokens; ``"sequence"`` makes an ordinary causal language model.
        num_recurrences: R, how often the stack of blocks is applied, each time to its own output
            and with the same weights; each application has keys and values of its own.
        halting: whether a head says after each application how much of a token's answer is what
            it is by then, as in adaptive computation time; the answer is the mixture.
        num_tasks: rows of the task embedding, 0 for none.
        num_symmetries: rows of the symmetry embedding, 0 for none.
        row_end_token_id, grid_token_ids: the tokens that end a row and that start a grid.
        rope_parameters: ``rope_theta`` and ``rope_type``, with what this takes; on grids it is
            ``"default"``, on sequences any of the library's.
        initializer_range: standard deviation of the embeddings as they are drawn; that of a matrix
            is one over the root of its inputs.
        hidden_dropout: dropout on the output of attention and experts, in training.
        router_aux_loss_coef: weight of the library's load-balancing loss when router logits are
            asked for; 0 leaves the shaping of routes to ``tiny_onn.shaping``.
    """

    model_type = "tiny_onn"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_local_experts": "num_experts"}
    # The experts of attention stay on every rank: a token's K queries are one attention, which
    # can't be sent to other ranks one by one.
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 16
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    shared_expert_intermediate_size: int = 0
    router: str = "mlp"
    router_selection_bias: bool = False
    position_type: Literal["grid", "sequence"] = "grid"
    num_tasks: int = 0
    num_symmetries: int = 8
    num_recurrences: int = 1
    halting: bool = False
    row_end_token_id: int = 10
    grid_token_ids: list[int] | tuple[int, ...] = (11, 12)
    max_position_embeddings: int = 4096
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.0
    pad_token_id: int | None = 14
    bos_token_id: int | None = 11
    eos_token_id: int | list[int] | None = 13

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.key_value_heads
        self.head_dim = self.head_width
        self.grid_token_ids = list(self.grid_token_ids)
        super().__post_init__(**kwargs)
        # Here as well as among the library's validators, whose exception is no ValueError.
        self.validate_sizes()
        self.base_model_tp_plan = self.tensor_parallel_plan()

    def tensor_parallel_plan(self) -> dict[str, str]:
        """Tensor parallelism, for ``DistributedConfig(tp_size=n)``: every rank has a slice of every
        expert.

        n has to divide the width of the feed-forward experts, and ``num_key_value_heads``: a rank
        has some of these and the query heads that ask them. Where an attention expert has no query
        head for each of them, attention stays whole on every rank.
        """
        plan = {
            "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
            "layers.*.mlp.experts.down_proj": "rowwise",
            "layers.*.mlp.experts": "moe_tp_experts",
        }
        if self.shared_expert_intermediate_size:
            plan["layers.*.mlp.shared.gate_up_proj"] = "packed_colwise"
            plan["layers.*.mlp.shared.down_proj"] = "rowwise"
        heads = self.num_attention_heads // self.attention_experts_per_tok
        if heads % self.key_value_heads == 0:
            plan["layers.*.self_attn.kv_proj"] = "packed_colwise"
            plan["layers.*.self_attn.heads.experts.q_proj"] = "colwise"
            plan["layers.*.self_attn.heads.experts.o_proj"] = "rowwise"
            plan["layers.*.self_attn.heads.experts"] = "moe_tp_experts"
        return plan

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig:
        """This configuration; as a decoder, which is what caches are made for, one whose number of
        layers counts every application of every block. It shares all else: what is set on one is
        set on both."""
        config = super().get_text_config(decoder, encoder)
        if decoder and self.num_recurrences > 1:
            config = object.__new__(_UnrolledConfig)
            object.__setattr__(config, "__dict__", self.__dict__)
        return config

    @property
    def key_value_heads(self) -> int:
        """G, heads of the keys and values."""
        default = self.num_attention_heads // self.attention_experts_per_tok
        return self.num_key_value_heads or default

    @property
    def attention_experts_per_tok(self) -> int:
        """Attention experts of a token, which divide its query heads among them: K, or the largest
        divisor of H below."""
        heads, most = self.num_attention_heads, max(1, self.num_experts_per_tok)
        return max(k for k in range(1, most + 1) if k == 1 or heads % k == 0)

    @property
    def head_width(self) -> int:
        """C, width of one head."""
        return self.head_dim or self.hidden_size // max(1, self.num_attention_heads)

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies; where none is set, 100 on grids (30 steps a side) and
        10,000 on sequences."""
        default = 100.0 if self.position_type == "grid" else 10_000.0
        return (self.rope_parameters or {}).get("rope_theta", default)

    @property
    def blank_token_ids(self) -> list[int]:
        """The end and padding tokens, which take no place on a grid."""
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        return [i for i in (*ends, self.pad_token_id) if i is not None]

    def validate_sizes(self) -> None:
        """Refuse sizes that no model can be built from, naming the field, the bound and the value.

        Raises:
            ValueError: what a user must mend.
        """
        from tiny_onn.routing import ROUTERS

        if self.router not in ROUTERS:
            raise ValueError(f"router must be one of {', '.join(ROUTERS)}. Got {self.router!r}")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}. Got {getattr(self, name)}")
        for name in ("hidden_dropout", "attention_dropout"):
            share = getattr(self, name)
            if not 0 <= share < 1:
                raise ValueError(f"{name} must be at least 0 and below 1. Got {share}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be between 1 and num_experts={self.num_experts}. "
                f"Got {self.num_experts_per_tok}"
            )
        self._check_heads()
        self.check_rope()

    def _check_heads(self) -> None:
        if self.key_value_heads < 1 or self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads. Got {self.key_value_heads}"
            )
        least = 8 if self.position_type == "grid" else 2
        if self.head_width % 2 or self.head_width < least:
            raise ValueError(f"head_dim must be even and at least {least}. Got {self.head_width}")

    def check_rope(self) -> None:
        """Refuse rotary settings that grids or the library don't know.

        Raises:
            ValueError: what a user must mend.
        """
        kind = (self.rope_parameters or {}).get("rope_type")
        known = ["default", *(ROPE_INIT_FUNCTIONS if self.position_type == "sequence" else ())]
        if kind not in known:
            names = " or ".join(map(repr, known))
            raise ValueError(f"rope_parameters['rope_type'] must be {names}. Got {kind!r}")
        if not isinstance(self.rope_theta, int | float) or self.rope_theta <= 0:
            raise ValueError(
                f"rope_parameters['rope_theta'] must be a positive number. Got {self.rope_theta!r}"
            )


class _UnrolledConfig(TinyOnnConfig):
    @property
    def num_hidden_layers(self) -> int:  # type: ignore[override]
        return self.__dict__["num_hidden_layers"] * self.num_recurrences
