"""The method: causal backbone, cached generation, sampling, the refiner, and what is measured."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from textbook import TextbookGPT

import data
import vsr
from vsr import GPT, GPTConfig, Refiner, RefinerConfig, nearest_code, sample

V, N, IMAGES, D, C = 11, 6, 4, 5, 16
GRID = (2, 3)
INPUTS = pytest.mark.parametrize("inputs", vsr.INPUTS)


@pytest.fixture
def gpt():
    """A small backbone with weights large enough that every input matters."""
    model = GPT(GPTConfig(layers=2, heads=2, width=C, dropout=0.0), V, N, IMAGES).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
        elif name.endswith("weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture
def prompt():
    return torch.randint(V, (3, (IMAGES - 1) * N))


@pytest.fixture
def codebook():
    """Not of unit norm, on purpose."""
    return torch.randn(V, D) * 3


def make_refiner(inputs: str, moved: bool = True, **options) -> Refiner:
    """A small refiner; `moved` gives its last layer random weights, so that it is not the identity any more."""
    refiner = Refiner(RefinerConfig(layers=2, heads=2, width=16, dropout=0.0, **options), inputs, GRID, D, C).eval()
    if moved:
        torch.nn.init.normal_(refiner.move.weight, std=0.5)
    return refiner


def states(batch: int = 3) -> dict:
    return {"hidden": torch.randn(batch, N, C), "context": torch.randn(batch, N, C)}


# Attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "causal", "length"), [(7, True, None), (7, False, None), (1, False, 3), (7, False, 5)])
def test_attention_is_the_softmax_of_its_docstring(dtype, queries, causal, length):
    q, k, v = torch.randn(2, 3, queries, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    scores = q @ k.transpose(-1, -2) / 8**0.5
    for t in range(queries):
        seen = t + 1 if causal else length or 7
        scores[..., t, seen:] = -torch.inf
    expected = scores.softmax(-1) @ v
    result = vsr.attend(q.to(dtype), k.to(dtype), v.to(dtype), causal, length)
    assert result.dtype == dtype
    assert torch.allclose(result.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.04)


def test_the_backbone_equals_the_textbook_and_so_do_its_gradients(gpt, prompt):
    plain, weights = TextbookGPT(gpt), torch.randn(3, prompt.shape[1], V)
    for model in (gpt, plain):
        (model(prompt) * weights).sum().backward()
    assert torch.allclose(gpt(prompt), plain(prompt), atol=1e-5)
    for name in ("token_embedding", "place_embedding", "image_embedding", "norm", "head"):
        assert torch.allclose(getattr(gpt, name).weight.grad, getattr(plain, name).weight.grad, rtol=1e-4, atol=1e-4)
    heads = [getattr(head, part).weight.grad for part in ("query", "key", "value") for head in plain.blocks[0].heads]
    assert torch.allclose(gpt.blocks[0].attention.qkv.weight.grad, torch.cat(heads), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_adds_a_bias_to_the_scores(dtype):
    q, k, v, bias = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8), torch.randn(3, 7, 7)
    expected = (q @ k.transpose(-1, -2) / 8**0.5 + bias).softmax(-1) @ v
    result = vsr.attend(q.to(dtype), k.to(dtype), v.to(dtype), bias=bias)
    assert torch.allclose(result.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.04)


def test_relative_bias_depends_on_the_offset_alone_and_starts_at_neighbours():
    h, w = 3, 4
    relative = vsr.RelativeBias(6, (h, w))
    looked_at = relative().argmax(-1)  # (6, N)
    centre = 1 * w + 1
    offsets = [divmod(t, w) for t in looked_at[:, centre].tolist()]
    steps = sorted((abs(y - 1), abs(x - 1)) for y, x in offsets)
    assert steps == [(0, 1), (0, 1), (1, 0), (1, 0), (1, 1), (1, 1)], "the four nearest, then diagonals"
    assert len(set(offsets)) == 6
    torch.nn.init.normal_(relative.table)
    bias = relative()
    seen = {}
    for t in range(h * w):
        for s in range(h * w):
            offset = (s // w - t // w, s % w - t % w)
            assert torch.equal(seen.setdefault(offset, bias[:, t, s]), bias[:, t, s])
    assert len({tuple(value.tolist()) for value in seen.values()}) == (2 * h - 1) * (2 * w - 1)


# The backbone


@pytest.mark.parametrize("autocast", [False, True])
def test_a_token_changes_later_logits_only(gpt, autocast):
    tokens = torch.randint(V, (2, IMAGES * N))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % V
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before, after = gpt(tokens), gpt(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert ((before[:, 10:] - after[:, 10:]).abs().amax((0, 2)) > 1e-3).all()


def test_logits_are_for_the_codebook_without_the_start_token(gpt, prompt):
    assert gpt(prompt).shape == (*prompt.shape, V)
    assert gpt.start_token == V
    assert gpt.shifted(torch.tensor([[4, 5, 6]])).tolist() == [[V, 4, 5]]


def naive_generate(gpt: GPT, prompt: torch.Tensor, num_tokens: int):
    """Greedy generation without a cache: the whole sequence again for every token."""
    sequence, hidden = F.pad(prompt, (1, 0), value=gpt.start_token), []
    for _ in range(num_tokens):
        hidden.append(gpt.states(sequence)[:, -1])
        sequence = torch.cat([sequence, gpt.head(hidden[-1]).argmax(-1, keepdim=True)], dim=1)
    return sequence[:, -num_tokens:], torch.stack(hidden, dim=1)


@torch.no_grad()
def test_cached_generation_is_uncached_generation(gpt, prompt):
    rollout = gpt.generate(prompt, N)
    tokens, hidden = naive_generate(gpt, prompt, N)
    assert torch.equal(rollout.tokens, tokens)
    assert torch.allclose(rollout.hidden, hidden, atol=1e-5)
    assert tokens.unique().numel() > 2


def test_reading_generated_tokens_gives_the_states_of_generation(gpt, prompt):
    written = gpt.generate(prompt, N)
    read = gpt.read(prompt, written.tokens)
    assert torch.equal(read.tokens, written.tokens)
    assert torch.allclose(read.hidden, written.hidden, atol=1e-5)
    assert torch.allclose(read.context, written.context, atol=1e-5)
    assert torch.equal(gpt.head(read.hidden).argmax(-1), written.tokens)


@torch.no_grad()
def test_context_is_the_states_over_the_query_source(gpt, prompt):
    """State i+1 is the first one that has read token i."""
    after_reading = gpt.states(F.pad(prompt, (1, 0), value=gpt.start_token))[:, 1:]
    assert torch.allclose(gpt.generate(prompt, N).context, after_reading[:, -N:], atol=1e-5)


def test_generation_works_under_bfloat16_autocast(gpt, prompt):
    with torch.autocast("cpu", torch.bfloat16):
        rollout = gpt.generate(prompt, N)
        read = gpt.read(prompt, rollout.tokens)
    assert rollout.tokens.shape == (3, N)
    assert F.cosine_similarity(rollout.hidden.float(), read.hidden.float(), dim=-1).min() > 0.99


def test_the_start_token_is_never_generated(gpt, prompt):
    rollout = gpt.generate(prompt.repeat(100, 1), N, temperature=50.0, generator=torch.Generator().manual_seed(0))
    assert rollout.tokens.unique().tolist() == list(range(V))


def test_a_prompt_that_is_too_long_is_an_error(gpt):
    with pytest.raises(ValueError, match="at most 24"):
        gpt.generate(torch.zeros(1, 19, dtype=torch.long), N)
    assert gpt.generate(torch.zeros(1, 18, dtype=torch.long), N).tokens.shape == (1, N)


def test_the_backbone_overfits_one_batch():
    model = GPT(GPTConfig(layers=2, heads=2, width=32, dropout=0.0), V, N, IMAGES)
    tokens = torch.randint(V, (4, IMAGES * N))
    tokens[:, 0] = torch.arange(4)  # the first token has nothing to be told by, but the rest has it
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = F.cross_entropy(model(tokens)[:, 1:].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    assert torch.equal(model.eval().generate(tokens[:, :-N], N).tokens, tokens[:, -N:])


# Sampling


def drawn(probabilities, draws: int = 4000, seed: int = 0, **flags) -> torch.Tensor:
    logits = torch.tensor(probabilities).log().expand(draws, -1)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **flags}
    return sample(logits, generator=torch.Generator().manual_seed(seed), **settings)


@pytest.mark.parametrize("flags", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-3}])
def test_greedy_and_its_equivalents(flags):
    assert drawn([0.2, 0.5, 0.3], **flags).unique().tolist() == [1]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.49, {1}), (0.51, {1, 2}), (0.79, {1, 2}), (0.81, {0, 1, 2}), (0.99, {0, 1, 2}), (1.0, {0, 1, 2})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, kept):
    assert set(drawn([0.2, 0.5, 0.3], top_p=top_p).tolist()) == kept


@pytest.mark.parametrize(("top_k", "kept"), [(0, {0, 1, 2}), (2, {1, 2}), (3, {0, 1, 2}), (99, {0, 1, 2})])
def test_top_k_keeps_the_k_likeliest(top_k, kept):
    assert set(drawn([0.2, 0.5, 0.3], top_k=top_k).tolist()) == kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_sharpens_and_flattens(temperature):
    p = torch.tensor([0.2, 0.5, 0.3])
    expected = (p.log() / temperature).softmax(-1)
    share = torch.bincount(drawn(p.tolist(), draws=20_000, temperature=temperature)) / 20_000
    assert torch.allclose(share, expected, atol=0.02)


def test_top_p_renormalises_what_it_keeps():
    share = torch.bincount(drawn([0.2, 0.5, 0.3], draws=20_000, top_p=0.7), minlength=3) / 20_000
    assert torch.allclose(share, torch.tensor([0, 0.625, 0.375]), atol=0.02)


def test_sampling_repeats_with_its_seed():
    p = [0.2, 0.5, 0.3]
    assert torch.equal(drawn(p, seed=1), drawn(p, seed=1))
    assert not torch.equal(drawn(p, seed=1), drawn(p, seed=2))


# LoRA


def test_lora_starts_as_the_model_and_trains_the_adapters_alone(gpt):
    tokens = torch.randint(V, (2, IMAGES * N))
    model = copy.deepcopy(gpt)
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    adapters = vsr.add_lora(model, rank=2)
    assert torch.allclose(model(tokens), gpt(tokens), atol=1e-6)
    assert len(adapters) == 2 * 4 * len(gpt.blocks), "attention's two and the MLP's two layers of each block"
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapters}
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    for _ in range(3):
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    now = {name.replace("parametrizations.weight.original", "weight"): p for name, p in model.named_parameters()}
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert not torch.allclose(model(tokens), gpt(tokens), atol=1e-3)


def test_a_merged_lora_is_an_ordinary_model_with_the_same_logits(gpt):
    tokens = torch.randint(V, (2, IMAGES * N))
    model = copy.deepcopy(gpt)
    for adapter in vsr.add_lora(model, rank=2):
        torch.nn.init.normal_(adapter, std=0.2)
    before = model(tokens)
    vsr.merge_lora(model)
    assert model.state_dict().keys() == gpt.state_dict().keys()
    assert torch.allclose(model(tokens), before, atol=1e-5)
    change = model.blocks[0].mlp[0].weight - gpt.blocks[0].mlp[0].weight
    assert torch.linalg.matrix_rank(change) == 2
    assert not any(p.requires_grad for p in model.parameters())


# The refiner


@INPUTS
def test_without_attention_each_position_is_alone(inputs):
    refiner, embeddings, given = make_refiner(inputs, attention=False), torch.randn(1, N, D), states(1)
    before = refiner(embeddings, **given)
    for position in range(N):
        changed = embeddings.clone()
        changed[:, position] += 1
        moved = (refiner(changed, **given) - before).abs().amax(-1)[0] > 1e-6
        assert moved.nonzero().flatten().tolist() == [position]


@INPUTS
def test_an_untrained_refiner_is_the_identity(inputs):
    codebook = F.normalize(torch.randn(200, D), dim=-1)
    tokens = torch.randint(200, (3, N))
    refined_tokens, refined = vsr.refine(make_refiner(inputs, moved=False), codebook, tokens, **states())
    assert torch.equal(refined_tokens, tokens)
    assert torch.allclose(refined, codebook[tokens], atol=1e-6)


def test_refined_tokens_are_right_under_bfloat16_autocast():
    """Codes this close are one and the same in bfloat16: the nearest code has to be found in float32."""
    codebook = F.normalize(torch.randn(20, 1, D) + 0.02 * torch.randn(20, 10, D), dim=-1).flatten(0, 1)
    tokens = torch.arange(198).view(-1, N)
    with torch.autocast("cpu", torch.bfloat16):
        refined, _ = vsr.refine(make_refiner("tokens", moved=False), codebook, tokens)
    assert torch.equal(refined, tokens)


@INPUTS
def test_refined_embeddings_have_unit_norm(inputs):
    refined = make_refiner(inputs)(torch.randn(3, N, D) * 7, **states())
    assert refined.shape == (3, N, D)
    assert torch.allclose(refined.norm(dim=-1), torch.ones(3, N), atol=1e-5)


@INPUTS
def test_the_refiner_reads_all_positions_at_once(inputs):
    refiner, embeddings, given = make_refiner(inputs), torch.randn(1, N, D), states(1)
    before = refiner(embeddings, **given)
    for position in range(N):
        changed = embeddings.clone()
        changed[:, position] += 1
        assert ((refiner(changed, **given) - before).abs().amax(-1) > 1e-6).all()


@INPUTS
def test_the_refiner_reads_what_its_name_says(inputs):
    refiner, embeddings, given = make_refiner(inputs), torch.randn(2, N, D), states(2)
    before = refiner(embeddings, **given)
    reads = {"hidden": inputs != "tokens", "context": inputs == "context"}
    for name, read in reads.items():
        after = refiner(embeddings, **{**given, name: torch.randn(2, N, C)})
        assert torch.allclose(before, after) != read


def test_the_refiner_ignores_the_length_of_embeddings():
    refiner, embeddings = make_refiner("tokens"), torch.randn(2, N, D)
    assert torch.allclose(refiner(embeddings), refiner(embeddings * 9), atol=1e-6)


def test_wrong_inputs_of_a_refiner_are_errors(codebook):
    embeddings, given = torch.randn(1, N, D), states(1)
    with pytest.raises(ValueError, match="2 x 3"):
        make_refiner("tokens")(torch.randn(1, N + 1, D))
    with pytest.raises(ValueError, match="hidden states"):
        make_refiner("hidden")(embeddings)
    with pytest.raises(ValueError, match="hidden states"):
        make_refiner("context")(embeddings, hidden=given["hidden"])
    with pytest.raises(ValueError, match="inputs 'nothing'"):
        make_refiner("nothing")
    with pytest.raises(ValueError, match="hidden_dim"):
        Refiner(RefinerConfig(), "hidden", GRID, D)
    for both in ({}, {"tokens": torch.zeros(1, N, dtype=torch.long), "embeddings": embeddings}):
        with pytest.raises(ValueError, match="tokens or embeddings"):
            vsr.refine(make_refiner("tokens"), codebook, **both)


@pytest.mark.parametrize("training", [True, False])
def test_refine_keeps_the_mode_and_gives_no_gradient(codebook, training):
    refiner = Refiner(RefinerConfig(width=16, dropout=0.9), "tokens", GRID, D).train(training)
    torch.nn.init.normal_(refiner.move.weight)
    tokens = torch.randint(V, (2, N))
    first, second = (vsr.refine(refiner, codebook, tokens)[1] for _ in range(2))
    assert refiner.training == training
    assert torch.equal(first, second), "no dropout in refine"
    assert not first.requires_grad


def test_refine_takes_tokens_or_their_embeddings(codebook):
    refiner, tokens = make_refiner("tokens"), torch.randint(V, (2, N))
    from_tokens = vsr.refine(refiner, codebook, tokens)
    from_embeddings = vsr.refine(refiner, codebook, embeddings=codebook[tokens])
    assert torch.equal(from_tokens[0], from_embeddings[0])
    assert torch.equal(from_tokens[0], nearest_code(from_tokens[1], codebook))


def test_the_refiner_overfits_one_batch(codebook):
    refiner = Refiner(RefinerConfig(layers=2, heads=2, width=32, dropout=0.0), "tokens", GRID, D)
    wrong, true = torch.randint(V, (2, 8, N))
    optimizer = torch.optim.AdamW(refiner.parameters(), lr=5e-3)
    for _ in range(300):
        loss = vsr.cosine_loss(refiner(codebook[wrong]), codebook[true])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    assert torch.equal(vsr.refine(refiner, codebook, wrong)[0], true)


# What is measured


def test_nearest_code(codebook):
    assert nearest_code(codebook, codebook).tolist() == list(range(V))
    embeddings = torch.randn(4, N, D)
    tokens = nearest_code(embeddings, codebook)
    assert torch.equal(tokens, nearest_code(embeddings * 100, codebook))
    assert torch.equal(tokens, nearest_code(embeddings, codebook * torch.rand(V, 1).add(0.1)))
    similarity = F.cosine_similarity(embeddings[:, :, None], codebook, dim=-1)
    assert torch.equal(tokens, similarity.argmax(-1))


def test_cosine_loss_values():
    a = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])
    assert vsr.cosine_loss(a, a * 5).item() == pytest.approx(0, abs=1e-6)
    assert vsr.cosine_loss(a, -a).item() == pytest.approx(2)
    assert vsr.cosine_loss(a, torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])).item() == pytest.approx((1 - 0.5**0.5) / 2)


def test_cosine_error_is_zero_exactly_where_the_token_is_right():
    codebook = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [0.3, 0.4]])
    error = vsr.cosine_error(torch.tensor([[0, 0, 0, 0, 3]]), torch.tensor([[0, 1, 2, 3, 3]]), codebook)
    assert error.tolist()[0] == pytest.approx([0, 1, 2, 0.4, 0])
    tokens = torch.arange(999)
    assert (vsr.cosine_error(tokens, tokens, torch.randn(999, 16)) == 0).all()
    assert (vsr.cosine_error(tokens, tokens.flip(0), torch.randn(999, 16)) == 0).sum() == 1


def test_expected_embedding(codebook):
    tokens = torch.randint(V, (3, N))
    assert torch.equal(vsr.expected_embedding(F.one_hot(tokens, V) * 100.0, codebook), tokens)
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.8]])  # half of each of the first two is nearest to the third
    assert vsr.expected_embedding(torch.tensor([[[5.0, 5.0, -99.0]]]), square).item() == 2


def test_a_gap_is_closed_only_where_there_is_one():
    assert math.isnan(vsr.gap_closed(0.1, 0.2, 0.1))
    assert math.isnan(vsr.gap_closed(0.1, 0.2, 0.15)), "the backbone is better on its own: harm must not look like repair"


@pytest.mark.parametrize(("refined", "expected"), [(0.5, 0), (0.1, 1), (0.3, 0.5), (0.7, -0.5), (0.0, 1.25)])
def test_gap_closed(refined, expected):
    assert vsr.gap_closed(0.5, refined, 0.1) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("config", "flags", "named"),
    [
        (GPTConfig, {"layers": 0}, "--gpt-layers"),
        (RefinerConfig, {"width": 30, "heads": 4}, "--refiner-heads"),
        (GPTConfig, {"head_width": 0}, "--gpt-head-width"),
        (RefinerConfig, {"dropout": 1.0}, "--refiner-dropout"),
        (RefinerConfig, {"rollouts": 0}, "--refiner-rollouts"),
        (data.DataConfig, {"num_demos": 0}, "--num-demos"),
    ],
)
def test_impossible_sizes_name_their_flag(config, flags, named):
    with pytest.raises(ValueError, match=named):
        config(**flags)
