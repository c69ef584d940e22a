"""Let the Auto classes of transformers find the model."""

from transformers import AutoConfig, AutoModelForCausalLM

from revnet.transformers._causal_lm import ReversibleTransformerForCausalLM
from revnet.transformers._causal_lm_config import ReversibleTransformerConfig


def register() -> None:
    """Register the config and the model."""
    AutoConfig.register(ReversibleTransformerConfig.model_type, ReversibleTransformerConfig, exist_ok=True)
    AutoModelForCausalLM.register(ReversibleTransformerConfig, ReversibleTransformerForCausalLM, exist_ok=True)
