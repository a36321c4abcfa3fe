"""LoRA, the other way to spend parameters on a frozen backbone."""

import copy

import pytest
import torch
import torch.nn.functional as F

from studies import lora
from vsr import GPT, GPTConfig

V, N, IMAGES = 11, 6, 4


@pytest.fixture
def gpt():
    return GPT(GPTConfig(layers=2, heads=2, width=16, dropout=0.0), V, N, IMAGES).eval()


@pytest.fixture
def tokens():
    return torch.randint(V, (2, IMAGES * N))


def test_lora_starts_as_the_model_and_trains_the_adapters_alone(gpt, tokens):
    model = copy.deepcopy(gpt)
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    adapters = lora.add_lora(model, rank=2)
    assert torch.allclose(model(tokens), gpt(tokens), atol=1e-6)
    assert len(adapters) == 2 * 4 * len(gpt.blocks), "attention's two and the MLP's two layers of each block"
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapters}
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    for _ in range(3):
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    now = {
        name.replace("parametrizations.weight.original", "weight"): p for name, p in model.named_parameters()
    }
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert not torch.allclose(model(tokens), gpt(tokens), atol=1e-3)


def test_a_merged_lora_is_an_ordinary_model_with_the_same_logits(gpt, tokens):
    model = copy.deepcopy(gpt)
    for adapter in lora.add_lora(model, rank=2):
        torch.nn.init.normal_(adapter, std=0.2)
    before = model(tokens)
    lora.merge_lora(model)
    assert model.state_dict().keys() == gpt.state_dict().keys()
    assert torch.allclose(model(tokens), before, atol=1e-5)
    change = model.blocks[0].mlp[0].weight - gpt.blocks[0].mlp[0].weight
    assert torch.linalg.matrix_rank(change) == 2
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_works_on_a_backbone_of_another_floating_type(gpt, tokens, dtype, when):
    if when == "before":
        gpt.to(dtype)
    for adapter in lora.add_lora(gpt, rank=2):
        torch.nn.init.normal_(adapter, std=0.02)
    gpt.to(dtype)
    logits = gpt(tokens)
    lora.merge_lora(gpt)
    assert torch.allclose(gpt(tokens).float(), logits.float(), atol=0.05)
    assert gpt.generate(tokens[:, :-N], N).tokens.shape == (2, N)
