"""The refiner on models that this project did not write.

A LLaMA of `transformers` over the codebook of a `diffusers` VQ model. Optional: `pip install transformers
diffusers`. Nothing is downloaded; both are built from a configuration and trained for some seconds.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import data
import train_refiner
import vsr

GRID, N, V = (4, 4), 16, 64
OFFSET = 3  # the vocabulary starts with three special tokens, as those of text models do
CONFIG = vsr.RefinerConfig(layers=1, heads=4, width=32, steps=150, batch_size=32)


@pytest.fixture(scope="module")
def elsewhere():
    transformers = pytest.importorskip("transformers")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sentences = data.Sentences(data.DataConfig(image_size=16), seed=0)
    images = torch.cat([sentences("train", index, 64)[0] for index in range(8)])  # (512, 4, 3, 16, 16)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    sizes = {"vq_embed_dim": 8, "latent_channels": 8, "norm_num_groups": 8}
    tokenizer = diffusers.VQModel(block_out_channels=[16, 16, 32], num_vq_embeddings=V, **sizes, **blocks)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=2e-3)
    for _ in range(120):
        batch = images.flatten(0, 1)[torch.randint(2048, (64,))]
        rebuilt = tokenizer.decode(tokenizer.encode(batch).latents, force_not_quantize=True).sample
        loss = F.mse_loss(rebuilt, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokenizer.eval().requires_grad_(False)
    latents = tokenizer.encode(images.flatten(0, 1)).latents  # (2048, 8, 4, 4)
    vectors = latents.movedim(1, -1).flatten(0, 2)
    codes = vectors[torch.randperm(len(vectors))[:V]]  # codes where the latents are
    tokenizer.quantize.embedding.weight.copy_(codes)
    tokens = tokenizer.quantize(latents)[2][2].view(512, 4 * N)

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = transformers.LlamaConfig(
        vocab_size=V + OFFSET, max_position_embeddings=4 * N, **sizes, **special
    )
    llama = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=3e-3)
    for _ in range(150):
        batch = tokens[torch.randint(512, (32,))] + OFFSET
        loss = llama(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    llama.eval().requires_grad_(False)

    def write(prompts):
        out = llama.generate(
            prompts + OFFSET,
            attention_mask=torch.ones_like(prompts),
            min_new_tokens=N,
            max_new_tokens=N,
            do_sample=False,
            output_hidden_states=True,
            return_dict_in_generate=True,
            suppress_tokens=list(range(OFFSET)),
        )
        steps = out.hidden_states  # the first: all of the prompt; then one new token each
        states = torch.cat([step[-1][:, -1:] for step in steps], dim=1)  # (B, N, C)
        query = steps[0][-1][:, -N:]  # (B, N, C): over src_q, the last image of the prompt
        return vsr.Rollout(out.sequences[:, -N:] - OFFSET, states, query)

    return write, tokens, tokenizer.quantize.embedding.weight, [*llama.parameters(), *tokenizer.parameters()]


@pytest.mark.parametrize("reads", [("tokens",), ("tokens", "query"), ("query",)], ids="+".join)
def test_a_llama_over_the_codebook_of_another_library(elsewhere, reads):
    write, tokens, codebook, frozen = elsewhere
    before = [p.clone() for p in frozen]
    prompts, truth = tokens[:, :-N], tokens[:, -N:]
    refiner, log = train_refiner.refiner_for(write, prompts[:448], truth[:448], codebook, GRID, reads, CONFIG)
    assert log["val_loss"][-1] < log["val_loss"][0]
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))
    with torch.no_grad():
        rollout = write(prompts[448:])
    refined, _ = vsr.refine(refiner, codebook, *rollout)
    error = [vsr.cosine_error(y, truth[448:], codebook).mean().item() for y in (rollout.tokens, refined)]
    assert error[0] > 0.02  # there is something to repair
    if "tokens" in reads:  # the control reads nothing that was written
        assert error[1] < error[0]


ZEROS = torch.zeros(8, 3 * N, dtype=torch.long)


def toy_write(prompts):
    return vsr.Rollout(prompts[:, -N:])


@pytest.mark.parametrize(
    ("truth", "grid", "codebook", "line"),
    [
        (torch.zeros(8, N + 1, dtype=torch.long), GRID, torch.randn(V, 8), "shapes differ"),
        (torch.zeros(8, N, dtype=torch.long), (4, 5), torch.randn(V, 8), "expects"),
        (torch.full((8, N), V), GRID, torch.randn(V, 8), "offset of the vocabulary"),
    ],
    ids=["another N", "another grid", "an offset"],
)
def test_shapes_that_do_not_fit_are_named(truth, grid, codebook, line):
    with pytest.raises(ValueError, match=line):
        train_refiner.refiner_for(toy_write, ZEROS, truth, codebook, grid, ("tokens",), CONFIG)


def test_one_sentence_is_not_enough_to_hold_one_out():
    with pytest.raises(ValueError, match="give two or more"):
        train_refiner.refiner_for(
            toy_write, ZEROS[:1], ZEROS[:1, :N], torch.randn(V, 8), GRID, ("tokens",), CONFIG
        )


@pytest.mark.parametrize("source", ["states", "query"])
def test_states_that_are_not_there_are_named(source):
    arguments = toy_write, ZEROS, ZEROS[:, :N], torch.randn(V, 8), GRID
    calls, config = [], replace(CONFIG, rollout_batch=2)

    def write(prompts):
        calls.append(prompts)
        return toy_write(prompts)

    with pytest.raises(ValueError, match=f"`write` gave no {source}"):
        train_refiner.refiner_for(write, *arguments[1:], ("tokens", source), config)
    assert len(calls) == 1, "before hours of writing"


@pytest.mark.parametrize("reads", [("tokens",), ("query",)], ids="+".join)
def test_what_is_not_read_need_not_be_there(reads):
    """Also without the two libraries: a model that copies the query, where each code is one too low."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(V, (32, N), generator=generator)
    codebook = torch.randn(V, 8, generator=generator)

    def write(prompts):
        return vsr.Rollout(prompts, query=codebook[prompts] if "query" in reads else None)

    config = vsr.RefinerConfig(
        layers=1, heads=2, width=16, rollouts=32, steps=10, batch_size=8, rollout_batch=5
    )
    refiner, log = train_refiner.refiner_for(write, prompts, (prompts + 1) % V, codebook, GRID, reads, config)
    assert log["val_loss"][-1] < log["val_loss"][0]
    assert refiner.reads == reads
    assert vsr.refine(refiner, codebook, *write(prompts))[0].shape == prompts.shape


def writes(tokens=lambda y: y, states=lambda x: x):
    """A `write` whose tokens and states are changed by a mistake."""
    table = torch.randn(V, 8, generator=torch.Generator().manual_seed(0))
    return lambda prompts: vsr.Rollout(tokens(prompts[:, -N:]), states(table[prompts[:, -N:]]))


def overflow(states):
    states = states.clone()
    states[-1, 2, 3] = torch.inf
    return states


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (writes(states=lambda x: x[:, -1:]), r"states \(\d+, 1, 8\): this refiner expects \(\d+, 16, 8\)"),
        (writes(states=lambda x: x[:, :, :4].repeat(1, 2, 1)), r"states \(\d+, 32, 4\)"),
        (writes(states=overflow), "not finite: states"),
        (writes(tokens=lambda y: y - 1), "outside 0 to 63"),
        (writes(tokens=lambda y: y[:, -1:]), "shapes differ"),
    ],
    ids=["the last state only", "another number of places", "an overflow", "-1", "the last token only"],
)
def test_what_a_model_from_elsewhere_gets_wrong_is_named(write, line):
    with pytest.raises(ValueError, match=line):
        train_refiner.refiner_for(write, ZEROS, ZEROS[:, :N], torch.randn(V, 8), GRID, config=CONFIG)


def test_what_it_reads_is_a_set_of_names():
    with pytest.raises(ValueError, match="expected one or more of"):
        train_refiner.refiner_for(toy_write, ZEROS, ZEROS[:, :N], torch.randn(V, 8), GRID, "tokens", CONFIG)


def test_states_in_half_precision_and_tokens_in_a_byte_are_taken():
    half = writes(tokens=lambda y: y.to(torch.uint8), states=lambda x: x.half())
    config = vsr.RefinerConfig(layers=1, heads=2, width=16, steps=3, batch_size=4)
    arguments = ZEROS, ZEROS[:, :N], torch.randn(V, 8).half(), GRID
    refiner, log = train_refiner.refiner_for(half, *arguments, config=config)
    assert log["val_loss"][-1] <= log["val_loss"][0]
    assert vsr.refine(refiner, arguments[2], *half(ZEROS))[0].shape == (8, N)
