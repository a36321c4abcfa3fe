"""The method: causal backbone, cached generation, sampling, the refiner, and what is measured."""

import math

import pytest
import torch
import torch.nn.functional as F

import vsr
from studies.textbook import TextbookGPT
from vsr import GPT, GPTConfig, Refiner, RefinerConfig, nearest_code, sample

V, N, IMAGES, D, C = 11, 6, 4, 5, 16
GRID = (2, 3)
READINGS = [
    ("tokens",),
    ("tokens", "states"),
    ("tokens", "states", "query"),
    ("tokens", "query"),
    ("query",),
]
NAMES = {"tokens": "embeddings", "states": "states", "query": "query"}  # {source: argument of `forward`}
all_readings = pytest.mark.parametrize("reads", READINGS, ids="+".join)
with_tokens = pytest.mark.parametrize("reads", READINGS[:-1], ids="+".join)


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


def make_refiner(reads, moved: bool = True, **options) -> Refiner:
    """A small refiner; `moved` gives its last layer large random weights: it is the identity no more."""
    config = RefinerConfig(layers=2, heads=2, width=16, dropout=0.0, **options)
    refiner = Refiner(config, reads, GRID, D, C).eval()
    if moved:
        torch.nn.init.normal_(refiner.to_code.weight, std=0.5)
    return refiner


def all_sources(batch: int) -> dict:
    """All that a refiner could read, by the names of `Refiner.forward`."""
    return {name: torch.randn(batch, N, D if name == "embeddings" else C) for name in NAMES.values()}


# Attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("queries", "causal", "length"), [(7, True, None), (7, False, None), (1, False, 3), (7, False, 5)]
)
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
        ours, theirs = getattr(gpt, name).weight.grad, getattr(plain, name).weight.grad
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    heads = [
        getattr(head, part).weight.grad
        for part in ("query", "key", "value")
        for head in plain.blocks[0].heads
    ]
    assert torch.allclose(gpt.blocks[0].attention.qkv.weight.grad, torch.cat(heads), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_adds_a_bias_to_the_scores(dtype):
    (q, k, v), bias = torch.randn(3, 2, 3, 7, 8), torch.randn(3, 7, 7)
    expected = (q @ k.transpose(-1, -2) / 8**0.5 + bias).softmax(-1) @ v
    result = vsr.attend(q.to(dtype), k.to(dtype), v.to(dtype), bias=bias)
    assert torch.allclose(result.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.04)


def test_attention_with_a_bias_is_the_same_whether_the_bias_learns_or_not():
    (q, k, v), bias = torch.randn(3, 3, 2, 6, 8), torch.randn(2, 6, 6)
    expected = ((q @ k.mT) / 8**0.5 + bias).softmax(-1) @ v
    assert torch.allclose(vsr.attend(q, k, v, bias=bias), expected, atol=1e-5)
    learnt = bias.clone().requires_grad_()
    y = vsr.attend(q, k, v, bias=learnt)
    assert torch.allclose(y, expected, atol=1e-5)
    y.square().sum().backward()
    assert learnt.grad.abs().sum() > 0 and torch.equal(learnt, bias)


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
        hidden.append(gpt.hidden(sequence)[:, -1])
        sequence = torch.cat([sequence, gpt.head(hidden[-1]).argmax(-1, keepdim=True)], dim=1)
    return sequence[:, -num_tokens:], torch.stack(hidden, dim=1)


@torch.no_grad()
def test_cached_generation_is_uncached_generation(gpt, prompt):
    rollout = gpt.generate(prompt, N)
    tokens, hidden = naive_generate(gpt, prompt, N)
    assert torch.equal(rollout.tokens, tokens)
    assert torch.allclose(rollout.states, hidden, atol=1e-5)
    assert tokens.unique().numel() > 2


def test_replaying_generated_tokens_gives_the_states_of_generation(gpt, prompt):
    written = gpt.generate(prompt, N)
    replayed = gpt.replay(prompt, written.tokens)
    assert torch.equal(replayed.tokens, written.tokens)
    assert torch.allclose(replayed.states, written.states, atol=1e-5)
    assert torch.allclose(replayed.query, written.query, atol=1e-5)
    assert torch.equal(gpt.head(replayed.states).argmax(-1), written.tokens)
    alone = gpt.replay(prompt)
    assert alone.tokens is alone.states is None
    assert torch.allclose(alone.query, written.query, atol=1e-5), "the query's states need no rollout"


@torch.no_grad()
def test_query_is_the_states_over_the_query_source(gpt, prompt):
    """State i+1 is the first one that has read token i."""
    after_reading = gpt.hidden(F.pad(prompt, (1, 0), value=gpt.start_token))[:, 1:]
    assert torch.allclose(gpt.generate(prompt, N).query, after_reading[:, -N:], atol=1e-5)


def test_generation_works_under_bfloat16_autocast(gpt, prompt):
    with torch.autocast("cpu", torch.bfloat16):
        rollout = gpt.generate(prompt, N)
        replayed = gpt.replay(prompt, rollout.tokens)
    assert rollout.tokens.shape == (3, N)
    assert F.cosine_similarity(rollout.states.float(), replayed.states.float(), dim=-1).min() > 0.99


def test_the_start_token_is_never_generated(gpt, prompt):
    generator = torch.Generator().manual_seed(0)
    rollout = gpt.generate(prompt.repeat(100, 1), N, temperature=50.0, generator=generator)
    assert rollout.tokens.unique().tolist() == list(range(V))


def test_a_prompt_that_is_too_long_is_an_error(gpt):
    with pytest.raises(ValueError, match="made for 24"):
        gpt.generate(torch.zeros(1, 19, dtype=torch.long), N)
    assert gpt.generate(torch.zeros(1, 18, dtype=torch.long), N).tokens.shape == (1, N)


def test_the_backbone_overfits_one_batch():
    model = GPT(GPTConfig(layers=1, heads=2, width=32, head_width=16, dropout=0.0), V, N, IMAGES)
    tokens = torch.randint(V, (4, IMAGES * N))
    tokens[:, 0] = torch.arange(4)  # the first token has nothing to be told by, but the rest has it
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
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


@pytest.mark.parametrize(
    "flags", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-3}]
)
def test_greedy_and_its_equivalents(flags):
    assert drawn([0.2, 0.5, 0.3], **flags).unique().tolist() == [1]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.49, {1}), (0.51, {1, 2}), (0.79, {1, 2}), *((p, {0, 1, 2}) for p in (0.81, 0.99, 1.0))],
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


# The refiner


@all_readings
def test_a_refiner_reads_its_sources_and_nothing_else(reads):
    refiner, given = make_refiner(reads), all_sources(2)
    before = refiner(**given)
    for source, name in NAMES.items():
        after = refiner(**{**given, name: torch.randn_like(given[name])})
        assert torch.equal(before, after) != (source in reads)
    assert torch.equal(before, refiner(**{NAMES[source]: given[NAMES[source]] for source in reads}))


@all_readings
@pytest.mark.parametrize("attention", [True, False])
def test_each_position_sees_all_of_them_or_without_attention_itself(reads, attention):
    refiner, given = make_refiner(reads, attention=attention), all_sources(1)
    before = refiner(**given)
    for source in reads:
        for position in range(N):
            changed = given[NAMES[source]].clone()
            changed[:, position, ::2] += 1
            moved = (refiner(**{**given, NAMES[source]: changed}) - before).abs().amax(-1)[0] > 1e-6
            assert moved.nonzero().flatten().tolist() == (list(range(N)) if attention else [position])


@with_tokens
def test_an_untrained_refiner_is_the_identity(reads):
    codebook = F.normalize(torch.randn(200, D), dim=-1)
    rollout = vsr.Rollout(torch.randint(200, (3, N)), torch.randn(3, N, C), torch.randn(3, N, C))
    refined_tokens, refined = vsr.refine(make_refiner(reads, moved=False), codebook, *rollout)
    assert torch.equal(refined_tokens, rollout.tokens)
    assert torch.allclose(refined, codebook[rollout.tokens], atol=1e-6)


def test_the_parallel_control_needs_no_rollout(codebook):
    refiner, query = make_refiner(("query",)), torch.randn(3, N, C)
    tokens, embeddings = vsr.refine(refiner, codebook, query=query)
    alone = F.normalize(refiner.change(None, None, query), dim=-1)  # there is nothing to add to
    torch.testing.assert_close(embeddings, alone, rtol=0, atol=1e-5)
    written, states = torch.randint(V, (3, N)), torch.randn(3, N, C)
    for given in (
        {"tokens": written},
        {"tokens": written, "states": states},
        {"embeddings": codebook[written]},
    ):
        again = vsr.refine(refiner, codebook, query=query, **given)
        assert torch.equal(tokens, again[0])
        assert torch.equal(embeddings, again[1])


@all_readings
def test_every_refiner_learns_from_the_first_step(reads):
    """With tokens it starts as the identity: its last layer alone has a gradient. Without, all have one."""
    refiner = make_refiner(reads, moved=False)
    vsr.cosine_loss(refiner(**all_sources(2)), torch.randn(2, N, D)).backward()
    assert refiner.to_code.weight.grad.abs().max() > 1e-3
    assert refiner.to_code.weight.any() == ("tokens" not in reads)
    behind = refiner.read[reads[0]][1].weight.grad.abs().max()
    assert behind > 1e-3 if "tokens" not in reads else behind == 0


def test_refined_tokens_are_right_under_bfloat16_autocast():
    """Codes this close are one and the same in bfloat16: the nearest code has to be found in float32."""
    codebook = F.normalize(torch.randn(20, 1, D) + 0.02 * torch.randn(20, 10, D), dim=-1).flatten(0, 1)
    tokens = torch.arange(198).view(-1, N)
    with torch.autocast("cpu", torch.bfloat16):
        refined, _ = vsr.refine(make_refiner(("tokens",), moved=False), codebook, tokens)
    assert torch.equal(refined, tokens)


@all_readings
def test_refined_embeddings_have_unit_norm(reads):
    given = all_sources(3)
    refined = make_refiner(reads)(**{**given, "embeddings": given["embeddings"] * 7})
    assert refined.shape == (3, N, D)
    assert torch.allclose(refined.norm(dim=-1), torch.ones(3, N), atol=1e-5)


def test_the_refiner_ignores_the_length_of_embeddings():
    refiner, embeddings = make_refiner(("tokens",)), torch.randn(2, N, D)
    assert torch.allclose(refiner(embeddings), refiner(embeddings * 9), atol=1e-6)


@all_readings
def test_a_source_that_is_missing_or_has_another_size_is_named(codebook, reads):
    refiner, given = make_refiner(reads), all_sources(2)
    rollout = {**given, "tokens": torch.zeros(2, N, dtype=torch.long)}
    del rollout["embeddings"]
    for source in reads:
        with pytest.raises(ValueError, match=f"no {source}$"):
            vsr.refine(refiner, codebook, **{**rollout, source: None})
        for positions in (1, N - 1, N + 1):
            wrong = {**rollout, source: torch.cat([rollout[source]] * 2, dim=1)[:, :positions]}
            with pytest.raises(ValueError, match=rf"{source} \(2, {positions}, .*expects \(2, {N}, "):
                vsr.refine(refiner, codebook, **wrong)


@all_readings
def test_states_of_another_shape_are_not_broadcast(codebook, reads):
    """(B, 1, C), the last state only, would be added to every place."""
    refiner, given = make_refiner(reads), all_sources(3)
    for source in reads:
        right = given[NAMES[source]]
        another_batch = [right[:1]] if len(reads) > 1 else []
        for wrong in (right[:, :1], right[..., :1], right[0], right[None], right.mT, *another_batch):
            with pytest.raises(ValueError, match=r"expects \(\d, 6, (5|16)\)"):
                refiner(**{**given, NAMES[source]: wrong})


def test_errors_and_losses_of_two_shapes_are_refused(codebook):
    tokens = torch.zeros(3, N, dtype=torch.long)
    for wrong in (tokens[:1], tokens[:, :1], tokens[0]):
        with pytest.raises(ValueError, match="shapes differ"):
            vsr.cosine_error(tokens, wrong, codebook)
        with pytest.raises(ValueError, match="shapes differ"):
            vsr.cosine_loss(codebook[tokens], codebook[wrong])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16])
def test_tokens_of_any_integer_type_are_the_same_tokens(codebook, dtype):
    tokens, refiner = torch.randint(V, (3, N)), make_refiner(("tokens",))
    small = tokens.to(dtype)
    assert torch.equal(vsr.refine(refiner, codebook, small)[1], vsr.refine(refiner, codebook, tokens)[1])
    assert torch.equal(vsr.cosine_error(small, tokens, codebook), torch.zeros(3, N))


@pytest.mark.parametrize(
    "tokens",
    [torch.full((2, N), -1), torch.full((2, N), V), torch.ones(2, N, dtype=torch.bool), torch.zeros(2, N)],
    ids=["-1", "V", "a mask", "floats"],
)
def test_what_is_no_token_is_an_error(codebook, tokens):
    with pytest.raises(ValueError, match=rf"tokens from .* expected integers from 0 to {V - 1}"):
        vsr.refine(make_refiner(("tokens",)), codebook, tokens)
    with pytest.raises(ValueError, match="tokens from"):
        vsr.cosine_error(tokens, torch.zeros(2, N, dtype=torch.long), codebook)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("source", ["embeddings", "states", "query"])
def test_a_number_that_is_none_is_named_and_not_refined(codebook, source, number):
    refiner, given = make_refiner(("tokens", "states", "query")), all_sources(2)
    given[source][1, 3, 2] = number
    with pytest.raises(ValueError, match=f"not finite: {source}$"):
        vsr.refine(refiner, codebook, **given)


def test_weights_and_codes_that_are_not_finite_are_named(gpt, prompt, codebook):
    refiner, tokens = make_refiner(("tokens",)), torch.zeros(2, N, dtype=torch.long)
    with pytest.raises(ValueError, match="codebook"):
        vsr.refine(refiner, torch.cat([codebook, torch.full((1, D), torch.inf)]), tokens)
    with pytest.raises(ValueError, match="codebook"):
        vsr.expected_embedding(torch.zeros(2, N, V), codebook * torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        vsr.expected_embedding(torch.full((2, N, V), torch.nan), codebook)
    refiner.blocks[0].mlp[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weights"):
        vsr.refine(refiner, codebook, tokens)
    gpt.blocks[1].mlp[0].weight.data[0, 0] = torch.inf
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="not finite: query"):
            gpt.generate(prompt, N, temperature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@all_readings
def test_refiners_work_in_any_floating_type(codebook, reads, dtype):
    refiner, given = make_refiner(reads), all_sources(2)
    _, expected = vsr.refine(refiner, codebook, **given)
    for sources in (given, {name: value.to(dtype) for name, value in given.items()}):
        _, refined = vsr.refine(refiner.to(dtype), codebook.to(dtype), **sources)
        assert F.cosine_similarity(refined.float(), expected, dim=-1).min() > 0.98


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_backbones_work_in_any_floating_type(prompt, dtype):
    model = GPT(GPTConfig(layers=2, heads=2, width=C), V, N, IMAGES).eval()
    tokens, logits = torch.randint(V, (3, IMAGES * N)), None
    for kind in (torch.float32, dtype):
        model.to(kind)
        rollout = model.generate(prompt, N)
        replayed = model.replay(prompt, rollout.tokens)
        assert torch.allclose(replayed.states.float(), rollout.states.float(), atol=0.1)
        before, logits = logits, model(tokens).float()
        assert model.logits(rollout.states).dtype == torch.float32
    assert torch.allclose(before, logits, atol=0.05)


@pytest.mark.parametrize(
    "make",
    [lambda: make_refiner(("tokens", "query")), lambda: GPT(GPTConfig(), V, N, 4)],
    ids=["refiner", "gpt"],
)
def test_a_model_made_without_memory_computes_the_same_when_it_is_filled(prompt, make):
    """All that a model computes with stands in its state, or is made when it is needed."""
    model = make().eval()
    with torch.device("meta"):
        filled = make().eval()
    filled.load_state_dict(model.state_dict(), assign=True)
    if isinstance(model, Refiner):
        given = all_sources(2)
        assert torch.equal(model(**given), filled(**given))
    else:
        assert torch.equal(model(prompt), filled(prompt))


def test_impossible_refiners_are_errors(codebook):
    for reads in ((), ("nothing",), ("tokens", "pixels"), "tokens"):
        with pytest.raises(ValueError, match="expected one or more of"):
            make_refiner(reads)
    for reads in (("tokens", "states"), ("query",)):
        with pytest.raises(ValueError, match="state_dim"):
            Refiner(RefinerConfig(), reads, GRID, D)
    both = {"tokens": torch.zeros(1, N, dtype=torch.long), "embeddings": torch.randn(1, N, D)}
    with pytest.raises(ValueError, match="tokens or embeddings"):
        vsr.refine(make_refiner(("tokens",)), codebook, **both)


def test_the_order_in_which_sources_are_named_changes_nothing():
    assert (
        make_refiner(("query", "tokens")).reads
        == make_refiner(["tokens", "query"]).reads
        == ("tokens", "query")
    )


@pytest.mark.parametrize("training", [True, False])
def test_refine_keeps_the_mode_and_gives_no_gradient(codebook, training):
    refiner = Refiner(RefinerConfig(width=16, dropout=0.9), ("tokens",), GRID, D).train(training)
    torch.nn.init.normal_(refiner.to_code.weight)
    tokens = torch.randint(V, (2, N))
    first, second = (vsr.refine(refiner, codebook, tokens)[1] for _ in range(2))
    assert refiner.training == training
    assert torch.equal(first, second), "no dropout in refine"
    assert not first.requires_grad


def test_refine_takes_tokens_or_their_embeddings(codebook):
    refiner, tokens = make_refiner(("tokens",)), torch.randint(V, (2, N))
    from_tokens = vsr.refine(refiner, codebook, tokens)
    from_embeddings = vsr.refine(refiner, codebook, embeddings=codebook[tokens])
    assert torch.equal(from_tokens[0], from_embeddings[0])
    assert torch.equal(from_tokens[0], nearest_code(from_tokens[1], codebook))


@pytest.mark.parametrize("reads", [("tokens",), ("query",)], ids="+".join)
def test_the_refiner_overfits_one_batch(codebook, reads):
    refiner = Refiner(RefinerConfig(layers=1, heads=2, width=32, dropout=0.0), reads, GRID, D, C)
    wrong, true = torch.randint(V, (2, 8, N))
    rollout = vsr.Rollout(wrong, query=torch.randn(8, N, C))
    optimizer = torch.optim.AdamW(refiner.parameters(), lr=1e-2)
    for _ in range(120):
        loss = vsr.cosine_loss(refiner(codebook[wrong], query=rollout.query), codebook[true])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    assert torch.equal(vsr.refine(refiner, codebook, *rollout)[0], true)


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
    b = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    assert vsr.cosine_loss(a, b).item() == pytest.approx((1 - 0.5**0.5) / 2)


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
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.8]])  # half of each of the first two: the third
    assert vsr.expected_embedding(torch.tensor([[[5.0, 5.0, -99.0]]]), square).item() == 2


def test_a_gap_is_closed_only_where_there_is_one():
    assert math.isnan(vsr.gap_closed(0.1, 0.2, 0.1))
    better_alone = vsr.gap_closed(0.1, 0.2, 0.15)
    assert math.isnan(better_alone), "harm must not look like repair"


@pytest.mark.parametrize(
    ("refined", "refined_forced", "expected"),
    [(0.5, 0.1, 0), (0.0, 0.0, 1), (0.05, 0.05, 1), (0.3, 0.1, 0.5), (0.7, 0.1, -0.5), (0.1, 0.02, 0.8)],
)
def test_exposure_removed(refined, refined_forced, expected):
    """A refiner that changes nothing removes nothing; one that always gives the truth removes all."""
    assert vsr.exposure_removed(0.5, refined, 0.1, refined_forced) == pytest.approx(expected)
    assert math.isnan(vsr.exposure_removed(0.1, refined, 0.1, refined_forced))


@pytest.mark.parametrize(("refined", "expected"), [(0.5, 0), (0.1, 1), (0.3, 0.5), (0.7, -0.5), (0.0, 1.25)])
def test_gap_closed(refined, expected):
    assert vsr.gap_closed(0.5, refined, 0.1) == pytest.approx(expected)
