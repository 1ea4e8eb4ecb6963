"""Networks of transformers on sequences without padding."""

from __future__ import annotations

import pytest
import torch

from harness.registry.networks.libraries import transformers_model

SMALL = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
}  # fmt: skip
WHISPER = {
    "d_model": 8, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8,
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 8,
}  # fmt: skip


def logits(model_type, head, **options):
    torch.manual_seed(0)
    model = transformers_model(model_type, head=head, vocab_size=13, context=6, **options).eval()
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        return model(tokens).logits, model(torch.cat([tokens[:, :-1], tokens[:, :1]], 1)).logits


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "roberta-prelayernorm"])
def test_the_kin_of_roberta_number_all_positions_of_a_context_without_padding(model_type):
    found, _ = logits(model_type, "MaskedLM", **SMALL)
    assert found.shape == (2, 6, 13)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("model_type", "options"), [("roberta", SMALL), ("bert", SMALL), ("whisper", WHISPER)]
)
def test_a_model_with_the_head_of_a_causal_one_is_causal(model_type, options):
    found, with_another_end = logits(model_type, "CausalLM", **options)
    torch.testing.assert_close(found[:, :-1], with_another_end[:, :-1])
    assert not torch.allclose(found[:, -1], with_another_end[:, -1])
