"""Pruned models of transformers go through their own files."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import prunus
from prunus.errors import InputError
from prunus.integrations.huggingface import save_pretrained

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
}
TOKENS = {"input_ids": torch.arange(3, 15).view(2, 6)}


def llama(**options: Any) -> Any:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, **options)
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**TOKENS).logits


HEADS = {"prune_num_heads": True, "prune_head_dims": False}


@pytest.mark.parametrize("make", [llama, lambda: llama(head_dim=8), bert], ids=["llama", "llama-head-dim", "bert"])
def test_a_model_without_half_of_its_heads_is_loaded_by_from_pretrained(make, tmp_path) -> None:
    model = make()
    before = sum(p.numel() for p in model.parameters())
    prunus.prune(model, TOKENS, prunus.Target(ratio=0.5), **HEADS)
    save_pretrained(model, TOKENS, tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(model), logits(again))
    assert sum(p.numel() for p in again.parameters()) < before


@pytest.mark.parametrize("make", [llama, bert])
def test_what_a_configuration_computes_otherwise_is_refused(make, tmp_path) -> None:
    """Scales of attention and rotary frequencies are made anew from the head size: the loaded model would differ."""
    model = make()
    prunus.prune(model, TOKENS, prunus.Target(ratio=0.5))
    with pytest.raises(InputError, match="whole heads"):
        save_pretrained(model, TOKENS, tmp_path / "out")


def test_layers_with_widths_of_their_own_are_refused_before_anything_is_written(tmp_path) -> None:
    model = llama()
    kept = [model.model.layers[0].mlp.up_proj]
    prunus.prune(model, TOKENS, prunus.Target(ratio=0.5), ignored_layers=kept, **HEADS)
    config = model.config.to_dict()
    with pytest.raises(InputError, match="no LlamaConfig describes this model"):
        save_pretrained(model, TOKENS, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert model.config.to_dict() == config


def test_other_models_are_refused() -> None:
    with pytest.raises(InputError, match="no model of transformers"):
        save_pretrained(torch.nn.Linear(2, 2), torch.ones(1, 2), "nowhere")
