"""The reversible language model as a model of Hugging Face transformers.

`import revnet.transformers` registers it. Then `AutoConfig`, `AutoModelForCausalLM`, `Trainer`, `generate`,
`save_pretrained` and `from_pretrained` work as for the models of transformers itself.

The names are provisional: they may change in any release.
"""

from revnet.errors import MissingDependencyError

__all__ = ["ConversionCallback", "DriftCallback", "ReversibleTransformerConfig", "ReversibleTransformerForCausalLM"]

try:
    from revnet.transformers._causal_lm import ReversibleTransformerForCausalLM as ReversibleTransformerForCausalLM
    from revnet.transformers._causal_lm_config import ReversibleTransformerConfig as ReversibleTransformerConfig
    from revnet.transformers._conversion_callback import ConversionCallback as ConversionCallback
    from revnet.transformers._drift_callback import DriftCallback as DriftCallback
    from revnet.transformers._registration import register
except ImportError as error:
    # Releases before 5 lack `PreTrainedConfig`, or their configs are not dataclasses.
    if str(error.name).partition(".")[0] != "transformers":
        raise
    raise MissingDependencyError(
        "`revnet.transformers` needs transformers 5 or newer, which is not installed; run "
        "`pip install 'transformers>=5' accelerate`."
    ) from error

register()
