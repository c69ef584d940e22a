"""The stored form with LLaMA's options equals transformers' LLaMA, with copied weights."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from revnet.models import ReversibleTransformer  # noqa: E402

# Notes of transformers about itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def make_pair(*, is_tied):
    """Return a LLaMA of transformers and a network with its weights."""
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=1e-6,
            rope_theta=500.0,
            tie_word_embeddings=is_tied,
        )
    ).double()
    model = ReversibleTransformer(
        vocab_size=50,
        dim=32,
        depth=3,
        num_heads=4,
        max_length=64,
        form="stored",
        num_kv_heads=2,
        norm="rms",
        norm_eps=1e-6,
        mlp="swiglu",
        ff_mult=2.5,
        bias=False,
        tie_embeddings=is_tied,
        rope_theta=500.0,
    ).double()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        model.embedding.weight.copy_(llama.model.embed_tokens.weight)
        model.norm.weight.copy_(llama.model.norm.weight)
        model.head.weight.copy_(llama.lm_head.weight)
        for own, other in zip(model.blocks, llama.model.layers, strict=True):
            attention = other.self_attn
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            own.f.norm.weight.copy_(other.input_layernorm.weight)
            own.f.attention.qkv.weight.copy_(torch.cat([projection.weight for projection in projections]))
            own.f.attention.project.weight.copy_(attention.o_proj.weight)
            own.g.layers[0].weight.copy_(other.post_attention_layernorm.weight)
            own.g.layers[1].load_state_dict(other.mlp.state_dict())
    return llama.eval(), model.eval()


@pytest.mark.parametrize("is_tied", [False, True])
def test_logits_equal_llama(is_tied):
    """transformers computes rotary tables and norms in float32, so the difference is as large as its rounding."""
    llama, model = make_pair(is_tied=is_tied)
    tokens = torch.randint(50, (3, 20))
    expected = llama(tokens).logits
    assert sum(p.numel() for p in model.parameters()) == llama.num_parameters()
    assert float((model(tokens) - expected).detach().abs().max()) <= 1e-5 * float(expected.detach().abs().max())


def test_gradients_equal_llama():
    llama, model = make_pair(is_tied=False)
    tokens = torch.randint(50, (3, 20))
    llama(tokens, labels=tokens).loss.backward()
    model(tokens[:, :-1], targets=tokens[:, 1:]).backward()
    pairs = [
        (model.embedding.weight, llama.model.embed_tokens.weight),
        (model.blocks[0].f.attention.project.weight, llama.model.layers[0].self_attn.o_proj.weight),
        (model.blocks[1].g.layers[1].down_proj.weight, llama.model.layers[1].mlp.down_proj.weight),
        (model.head.weight, llama.lm_head.weight),
    ]
    for own, other in pairs:
        assert float((own.grad - other.grad).abs().max()) <= 1e-4 * float(other.grad.abs().max())


def test_generated_tokens_equal_llama():
    llama, model = make_pair(is_tied=False)
    tokens = torch.randint(50, (3, 8))
    mask = torch.arange(8) >= torch.tensor([[0], [3], [7]])
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = llama.generate(tokens, attention_mask=mask.long(), **options)
    assert torch.equal(model.generate(tokens, 40, mask=mask, temperature=0), expected)
