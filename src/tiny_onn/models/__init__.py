"""The Tiny-ONN transformer, as a model of the `transformers` library."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tiny_onn.models.configuration_tiny_onn import TinyOnnConfig
from tiny_onn.models.experts_backend import register
from tiny_onn.models.export import export
from tiny_onn.models.modeling_tiny_onn import (
    TinyOnnForCausalLM,
    TinyOnnModel,
    TinyOnnPreTrainedModel,
)

register()
AutoConfig.register("tiny_onn", TinyOnnConfig, exist_ok=True)
AutoModel.register(TinyOnnConfig, TinyOnnModel, exist_ok=True)
AutoModelForCausalLM.register(TinyOnnConfig, TinyOnnForCausalLM, exist_ok=True)

__all__ = [
    "TinyOnnConfig",
    "TinyOnnForCausalLM",
    "TinyOnnModel",
    "TinyOnnPreTrainedModel",
    "export",
]
