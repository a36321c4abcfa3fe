"""What a training is given, what it does with it, and what one stage hands to the next.

The models are real and small, and note what they are given. Tokens and states tell which sentence
they come from.
"""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import runtime
import train_refiner
import vqgan
import vsr
from vsr import GPT, GPTConfig, Refiner, RefinerConfig, Rollout

CPU, FLOAT = torch.device("cpu"), torch.float32
PLAIN = torch.autocast("cpu", enabled=False)
N, GRID, IMAGES = 4, (2, 2), 4
TRAIN, VAL = 20, 140  # sentences; the backbone validates on 128 of them
V = 2 * (TRAIN + VAL)
CODES = F.normalize(torch.randn(V, 8, generator=torch.Generator().manual_seed(0)), dim=-1)


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def weights_of(model: nn.Module) -> dict:
    return copy.deepcopy(model.state_dict())


def gradient_norm(model: nn.Module) -> float:
    return torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()


# Stages 2 and 4: the loops of backbone and refiner


class Reader(Refiner):
    """A refiner that notes its first weights and each of its calls."""

    def __init__(self, *args):
        super().__init__(*args)
        self.first, self.calls = weights_of(self), []

    def forward(self, embeddings=None, states=None, query=None):
        call = {"learns": torch.is_grad_enabled(), "training": self.training, "states": states}
        self.calls.append(SimpleNamespace(**call, tokens=vsr.nearest_code(embeddings, CODES), query=query))
        return super().forward(embeddings, states, query)


class Writer(GPT):
    """A backbone that notes its first weights and each of its calls."""

    def __init__(self, *args):
        super().__init__(*args)
        self.first, self.calls = weights_of(self), []

    def forward(self, tokens):
        call = {"learns": torch.is_grad_enabled(), "training": self.training, "tokens": tokens}
        self.calls.append(SimpleNamespace(**call))
        self.calls[-1].logits = super().forward(tokens)
        return self.calls[-1].logits


SPLITS = {"train": torch.arange(TRAIN), "val": torch.arange(TRAIN, TRAIN + VAL)}
TARGETS = {split: (rows + V // 2)[:, None].expand(-1, N).short() for split, rows in SPLITS.items()}
ROLLOUTS = {
    split: Rollout(rows[:, None].expand(-1, N).short(), *(s * rows[:, None, None].expand(-1, N, 3)))
    for s in (torch.tensor([1.0, -1.0]).view(2, 1, 1, 1),)
    for split, rows in SPLITS.items()
}
SENTENCES = {
    split: ((rows[:, None] + 3 * torch.arange(IMAGES * N)) % V).view(-1, IMAGES, N).short()
    for split, rows in SPLITS.items()
}


def train_a_refiner(seed=0, loss_function=vsr.cosine_loss, **options):
    config = RefinerConfig(**{"layers": 1, "heads": 2, "width": 16, "batch_size": 8, **options})
    given = (config, vsr.SOURCES, CODES, GRID, ROLLOUTS, TARGETS)
    return train_refiner.train_refiner(*given, CPU, FLOAT, seed, loss_function, Reader)


def train_a_backbone(seed=0, make=Writer, **options):
    sizes = {"layers": 1, "heads": 2, "width": 16, "head_width": 8, "batch_size": 8}
    given = (GPTConfig(**{**sizes, **options}), SENTENCES["train"], SENTENCES["val"], V)
    return train_refiner.train_backbone(*given, CPU, FLOAT, seed, make=make)


@pytest.fixture(scope="module")
def refined():
    """A trained refiner, its log, and the truth that each of its calls was compared with."""
    truth = []

    def loss(refined, target):
        truth.append(vsr.nearest_code(target, CODES))
        return vsr.cosine_loss(refined, target)

    refiner, log = train_a_refiner(steps=31, dropout=0.5, loss_function=loss)
    return SimpleNamespace(model=refiner, log=log, calls=refiner.calls[:], truth=truth)


@pytest.fixture(scope="module")
def written():
    """A trained backbone and its log."""
    backbone, log = train_a_backbone(steps=31, dropout=0.5)
    return SimpleNamespace(model=backbone, log=log, calls=backbone.calls[:])


def test_a_refiner_reads_a_rollout_and_is_compared_with_its_own_truth(refined):
    assert len(refined.truth) == len(refined.calls)
    for call, truth in zip(refined.calls, refined.truth, strict=True):
        assert torch.equal(call.tokens, truth - V // 2)
        assert torch.equal(call.states, call.tokens[..., None].expand(-1, -1, 3).float())
        assert torch.equal(call.query, -call.states)


def test_the_refiner_sees_every_rollout_and_no_held_out_one(refined):
    learnt = [call.tokens[:, 0] for call in refined.calls if call.learns]
    assert [len(rows) for rows in learnt] == 31 * [8]
    assert set(torch.cat(learnt).tolist()) == set(SPLITS["train"].tolist())


def test_the_backbone_sees_every_sentence_and_no_held_out_one(written):
    learnt = [call.tokens for call in written.calls if call.learns]
    assert [len(rows) for rows in learnt] == 31 * [8]
    learnt = torch.cat(learnt)
    assert torch.equal(learnt, SENTENCES["train"].flatten(1)[learnt[:, 0]].long())
    assert set(learnt[:, 0].tolist()) == set(SPLITS["train"].tolist())


def test_dropout_is_on_in_every_step_and_off_in_every_validation(refined, written):
    for calls in (refined.calls, written.calls):
        assert {call.learns for call in calls} == {True, False}
        assert all(call.training == call.learns for call in calls)


@torch.no_grad()
def test_the_refiners_validation_is_of_the_held_out_rollouts(refined):
    """The last one is that of the refiner which is returned; all rollouts count alike."""
    assert refined.log["step"] == [0, 20, 30]
    assert refined.log["val_step"] == list(range(0, 31, 2))
    held_out = torch.cat([call.tokens[:, 0] for call in refined.calls if not call.learns])
    assert torch.equal(held_out, SPLITS["val"].repeat(16))
    rollout, truth = ROLLOUTS["val"], CODES[TARGETS["val"].long()]
    error = vsr.cosine_loss(refined.model(CODES[rollout.tokens.long()], *rollout[1:]), truth)
    assert refined.log["val_loss"][-1] == pytest.approx(error.item(), abs=1e-5)
    assert refined.log["val_loss"][-1] != pytest.approx(refined.log["val_loss"][0], abs=1e-4)


@torch.no_grad()
def test_the_backbones_validation_is_of_128_held_out_sentences(written):
    """The last one is that of the backbone which is returned."""
    log, val = written.log, SENTENCES["val"][:128].flatten(1).long()
    assert log["step"] == [0, 20, 30]
    assert log["val_step"] == list(range(0, 31, 2))
    held_out = torch.cat([call.tokens for call in written.calls if not call.learns])
    assert torch.equal(held_out, val.repeat(16, 1))
    logits = written.model(val)
    loss = F.cross_entropy(logits.mT, val, reduction="none")
    assert log["val_loss"][-1] == pytest.approx(loss.mean().item(), abs=1e-5)
    assert log["val_target_loss"][-1] == pytest.approx(loss[:, -N:].mean().item(), abs=1e-5)
    right = (logits.argmax(-1) == val)[:, -N:].float().mean().item()
    assert log["val_target_accuracy"][-1] == pytest.approx(right, abs=1e-5)


@pytest.mark.parametrize(
    ("losses", "step"),
    [([3, 2, 1], None), ([3, 1, 1.04], None), ([3, 1, 1.06], 40), ([1, 2, 3], 0), ([2], None)],
)
def test_a_validation_loss_that_rises_is_seen_and_from_where(losses, step):
    log = {"val_step": [0, 40, 80][: len(losses)], "val_target_loss": losses}
    assert train_refiner.turned_at(log) == step


def test_the_backbone_learns_all_tokens_of_a_sentence(written):
    first = written.calls[0]
    loss = F.cross_entropy(first.logits.flatten(0, 1), first.tokens.flatten())
    assert written.log["loss"][0] == pytest.approx(loss.item(), abs=1e-5)


def test_what_a_training_returns_was_trained_and_is_frozen(refined, written):
    for model in (refined.model, written.model):
        now = model.state_dict()
        assert not any(torch.equal(now[name], value) for name, value in model.first.items() if value.ndim > 1)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("train", [train_a_refiner, train_a_backbone])
def test_the_seed_and_nothing_else_decides_on_weights_and_batches(train):
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(100 + len(made))
        made.append(train(seed, steps=1)[0])
    rows = [model.calls[0].tokens[:, 0].tolist() for model in made]
    assert rows[0] == rows[1] != rows[2]
    assert same_weights(made[0].first, made[1].first)
    assert not same_weights(made[0].first, made[2].first)
    assert same_weights(made[0].state_dict(), made[1].state_dict())


# Steps


def test_gradients_are_clipped_to_a_norm_of_one_in_both_loops():
    class Loud(GPT):
        def forward(self, tokens):
            return 1e4 * super().forward(tokens)

    refiner, _ = train_a_refiner(steps=1, loss_function=lambda *pair: 1e6 * vsr.cosine_loss(*pair))
    backbone, _ = train_a_backbone(steps=1, make=Loud)
    assert gradient_norm(refiner) == pytest.approx(1, rel=1e-3)
    assert gradient_norm(backbone) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(("clip", "size"), [(1.0, 1.0), (None, 10.0), (100.0, 10.0)])
def test_a_step_goes_down_its_own_gradient_at_its_rate(clip, size):
    """Whatever gradients and rates are left of the step before."""
    model, gradient = nn.Linear(3, 2), torch.randn(8)
    gradient *= 10 / gradient.norm()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    for p in model.parameters():
        p.grad = torch.full_like(p, 77.0)
    optimizers = [torch.optim.SGD([p], lr=99.0) for p in model.parameters()]
    loss = nn.utils.parameters_to_vector(model.parameters()) @ gradient
    train_refiner.optimizer_step(loss, model, optimizers, 0.5, clip)
    moved = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert torch.allclose(moved, -0.5 * size / 10 * gradient, atol=1e-4)


def train_a_tokenizer(sentences, **options):
    sizes = {"codebook_size": 32, "code_dim": 8, "channels": 16, "res_blocks": 1, "batch_size": 8}
    config = vqgan.VQGANConfig(**{**sizes, **options})
    return train_refiner.train_tokenizer(config, sentences, CPU, FLOAT, 0)


@pytest.fixture(scope="module")
def toy():
    return data.Sentences(data.DataConfig(image_size=16), 0)


def test_every_loop_follows_the_schedule_and_trains_all_parameters(monkeypatch, toy):
    steps, real = [], train_refiner.optimizer_step

    def step(loss, model, optimizers, rate, **options):
        held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        steps.append((rate, sorted(map(id, held)) == sorted(map(id, model.parameters()))))
        real(loss, model, optimizers, rate, **options)

    monkeypatch.setattr(train_refiner, "optimizer_step", step)
    for train in (
        train_a_refiner,
        train_a_backbone,
        lambda **options: train_a_tokenizer(toy, **options),
    ):
        steps.clear()
        train(steps=4, learning_rate=3e-3)
        assert steps == [(train_refiner.scheduled_rate(step, 4, 3e-3), True) for step in range(4)]


def test_the_learning_rate_is_a_short_rise_and_half_a_cosine_down_to_a_fiftieth():
    def rate(step, steps):
        return train_refiner.scheduled_rate(step, steps, 10.0)

    assert [rate(step, 1000) for step in (0, 9, 24)] == pytest.approx([0.2, 2, 5], rel=0.01)
    assert rate(49, 1000) == pytest.approx(10, rel=0.01), "a twentieth of the steps"
    assert [rate(step, 9000) for step in (49, 99)] == pytest.approx([5, 10], rel=0.01), "but at most 100"
    assert [rate(step, 1000) for step in (250, 500, 750)] == pytest.approx([8.536, 5, 1.464], rel=0.001)
    assert [rate(step, 1000) for step in (940, 999)] == pytest.approx([0.2, 0.2])
    assert rate(900, 1000) > 0.2
    assert rate(0, 5) == 10, "no rise where there is no time for it"


@pytest.mark.parametrize("model", [GPT(GPTConfig(layers=2, width=16), 9, N, IMAGES), None], ids=["gpt", ""])
def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest(model):
    """By what they do: without a gradient Muon shrinks its weights by 5 % of the rate, AdamW leaves them."""
    if model is None:
        model = Refiner(RefinerConfig(layers=2, heads=2, width=16), vsr.SOURCES, GRID, 5, 7)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = train_refiner.make_optimizers(model, 0.5)
    train_refiner.optimizer_step(
        sum(0 * p.sum() for p in model.parameters()), model, optimizers, 0.1, clip=None
    )
    for name, p in model.named_parameters():
        matrix = name.startswith("blocks.") and p.ndim == 2
        assert torch.allclose(p, before[name] * (1 - 0.1 * 0.05 * matrix), rtol=1e-6, atol=1e-7), name


def test_adamw_averages_the_gradient_over_10_steps_and_its_square_over_50():
    model = GPT(GPTConfig(layers=1, width=16), 9, N, IMAGES)
    p, other = model.head.weight, nn.Parameter(model.head.weight.detach().clone())
    ours = train_refiner.make_optimizers(model, 0.01)
    theirs = torch.optim.AdamW([other], lr=0.01, betas=(0.9, 0.98), weight_decay=0.0)
    for number in range(4):
        gradient = torch.randn(p.shape) * 10.0 ** (number - 2)
        p.grad, other.grad = gradient, gradient.clone()
        ours[1].step()
        theirs.step()
    assert torch.allclose(p, other, atol=1e-6)


def test_muon_goes_on_in_the_direction_of_its_momentum():
    parameter = nn.Parameter(torch.randn(6, 4))
    optimizer = train_refiner.Muon([parameter], lr=0.1, weight_decay=0.0)
    moves = []
    for gradient in (torch.randn(6, 4), torch.zeros(6, 4)):
        before = parameter.detach().clone()
        parameter.grad = gradient
        optimizer.step()
        moves.append(parameter.detach() - before)
    assert torch.allclose(moves[0], moves[1], atol=1e-3)
    assert moves[0].norm() > 0.05


# Stage 1: the loop of the tokenizer


def test_the_tokenizer_learns_from_fresh_images_and_revives_codes_for_four_fifths_of_the_steps(
    monkeypatch, toy
):
    """40 steps; codes are revived every 5."""
    given, counted, revived = [], [], []
    count_use, revive = vqgan.Codebook.count_use, vqgan.Codebook.revive

    class Sentences:
        config = toy.config

        def __call__(self, split, index, n):
            images, task = toy(split, index, n)
            given.append((split, index, images))
            return images, task

    def note_use(codebook, tokens):
        counted.append(tokens)
        count_use(codebook, tokens)

    def note_revival(codebook, z, for_steps, generator):
        number = revive(codebook, z, for_steps, generator)
        revived.append((len(counted), number, for_steps, z))
        return number

    monkeypatch.setattr(vqgan.Codebook, "count_use", note_use)
    monkeypatch.setattr(vqgan.Codebook, "revive", note_revival)
    model, log = train_a_tokenizer(Sentences(), steps=40, revive_every=5)
    assert [(split, index) for split, index, _ in given] == [("train", step) for step in range(40)]
    assert [tuple(tokens.shape) for tokens in counted] == 40 * [(8, 16)]
    assert [steps for steps, *_ in revived] == [5, 10, 15, 20, 25, 30]
    assert {for_steps for _, _, for_steps, _ in revived} == {5}
    assert all(number > 0 for _, number, *_ in revived[:2]), "few of 32 codes are used at the start"
    assert all(z.shape == (128, 8) and not z.requires_grad for *_, z in revived)
    assert (model.codebook.unused[counted[-1].unique()] == 0).all()
    assert log["codes_in_use"][-1] == len(counted[-1].unique())
    assert not model.training


def test_a_code_is_revived_only_when_it_was_not_used_for_long():
    """Used in each step, none of them moves."""
    codebook = vqgan.Codebook(8, 4)
    before = codebook.weight.detach().clone()
    codebook.count_use(torch.arange(8).view(2, 4))
    assert codebook.unused.tolist() == 8 * [0]
    assert codebook.revive(torch.randn(5, 4), 1, torch.Generator().manual_seed(0)) == 0
    assert torch.equal(codebook.weight, before)


def test_the_loss_on_slopes_moves_the_decoder(toy):
    trained = [
        train_a_tokenizer(toy, steps=1, gradient_weight=weight)[0].decoder[-1].weight for weight in (0.0, 9.0)
    ]
    assert not torch.equal(*trained)


# Stage 3: rollouts


class Backbone:
    """Writes the first token of a sentence once more, and notes what it is given.

    The states of a rollout are that number, those of its query the number below zero.
    """

    head = SimpleNamespace(weight=torch.zeros(1))

    def __init__(self):
        self.prompts, self.lengths, self.replayed = [], [], []

    def generate(self, prompt, length):
        self.prompts.append(prompt)
        self.lengths.append(length)
        return Rollout(prompt[:, :1].expand(-1, length) + 1)

    def replay(self, prompt, tokens=None):
        self.prompts.append(prompt)
        self.replayed.append(tokens)
        states = prompt[:, :1, None].expand(-1, N, 2).float()
        return Rollout(tokens, None if tokens is None else states, -states)


def numbered(sentences: int) -> torch.Tensor:
    """Sentences (S, 4, N) whose first token is their number, and whose other tokens all differ."""
    later = (torch.arange(sentences)[:, None] * 15 + torch.arange(15)) + 200
    return torch.cat([torch.arange(sentences)[:, None], later], dim=1).view(-1, IMAGES, N).short()


def test_rollouts_are_written_after_demonstrations_and_query():
    backbone, tokens = Backbone(), numbered(130)
    made, _ = train_refiner.make_rollouts(backbone, tokens, PLAIN, 64)
    assert torch.equal(torch.cat(backbone.prompts), tokens[:, :3].flatten(1).long())
    assert backbone.lengths == [N, N, N]
    assert torch.equal(made, (torch.arange(130)[:, None] + 1).expand(-1, N).short())


@pytest.mark.parametrize("reads", vsr.SOURCES)
def test_states_are_those_of_the_sentence_and_of_what_was_written_after_it(reads):
    backbone, tokens = Backbone(), numbered(130)
    generated = tokens[:, 1]
    rollout = train_refiner.replay_rollouts(backbone, tokens, generated, {"tokens", reads}, PLAIN)
    assert torch.equal(rollout.tokens, generated)
    if reads == "tokens":
        assert not backbone.prompts
        return
    assert torch.equal(torch.cat(backbone.prompts), tokens[:, :3].flatten(1).long())
    number = torch.arange(130)[:, None, None].expand(-1, N, 2)
    assert (rollout.query is None) == (reads != "query"), "what is not read is not kept"
    if reads == "query":
        assert torch.equal(rollout.query, -number.bfloat16())
    if reads == "states":
        assert torch.equal(torch.cat(backbone.replayed), generated.long())
        assert torch.equal(rollout.states, number.bfloat16())


def test_a_sixteenth_of_foreign_sentences_is_held_out(monkeypatch):
    """Everything that belongs to a sentence stays together, and none is on both sides."""
    given, asked = {}, []
    signature = inspect.signature(train_refiner.train_refiner)
    monkeypatch.setattr(
        train_refiner, "train_refiner", lambda *args: given.update(signature.bind(*args).arguments)
    )

    def write(prompts):
        asked.append(prompts)
        number = prompts[:, :1].expand(-1, N)
        states = number[..., None].float()
        return Rollout(number + 60, states, -states)

    codebook, config = torch.randn(200, 5) * 7, RefinerConfig(rollout_batch=20)
    prompts = torch.arange(48)[:, None].repeat(1, 12)
    truth = torch.arange(48)[:, None].expand(-1, N) + 120
    train_refiner.refiner_for(write, prompts, truth, codebook, GRID, vsr.SOURCES, config, seed=7)
    assert torch.equal(torch.cat(asked), prompts)
    assert max(map(len, asked)) == 20
    rows = {}
    for split, rollout in given["rollouts"].items():
        rows[split] = rollout.states[:, 0, 0].tolist()
        assert torch.equal(rollout.tokens, given["target_tokens"][split] - 60)
        assert torch.equal(rollout.tokens - 60, rollout.states[..., 0].long())
        assert torch.equal(rollout.query, -rollout.states)
    assert (len(rows["train"]), len(rows["val"])) == (45, 3)
    assert sorted(rows["train"] + rows["val"]) == list(range(48))
    assert torch.allclose(given["codebook"], F.normalize(codebook, dim=-1))
    assert (given["seed"], given["config"], tuple(given["reads"])) == (7, config, vsr.SOURCES)


# What one stage hands to the next


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """All stages of a tiny run: what each was given and returned.

    Rollouts are replaced: for a sentence, the tokens of its first image.
    """
    config = {
        "data": data.DataConfig(image_size=16, train_sentences=70, eval_sentences=40),
        "vqgan": vqgan.VQGANConfig(
            codebook_size=32, code_dim=8, channels=16, res_blocks=1, steps=30, batch_size=16
        ),
        "gpt": GPTConfig(layers=1, heads=2, width=16, head_width=8, steps=3, batch_size=4),
        "refiner": RefinerConfig(layers=1, heads=2, width=16, rollouts=24, steps=3, batch_size=4),
    }
    given, made = {}, {}
    names = ("train_tokenizer", "train_backbone", "make_rollouts", "train_refiner")
    functions = {name: getattr(train_refiner, name) for name in names}

    def noting(name):
        def call(*args, **options):
            arguments = inspect.signature(functions[name]).bind(*args, **options).arguments
            key = "+".join(arguments["reads"]) if name == "train_refiner" else name
            given[key] = SimpleNamespace(**arguments)
            if name == "make_rollouts":
                return arguments["tokens"][:, 0], {"seconds": 0.0}
            model, log = functions[name](*args, **options)
            made[key] = weights_of(model)
            return model, log

        return call

    out, sentences = tmp_path_factory.mktemp("stages"), data.Sentences(config["data"], 5)
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(train_refiner, name, noting(name))
        readings = ("tokens", "tokens+query", "query")
        trained = train_refiner.train_models(out, config, readings, sentences, CPU, FLOAT, 5)
    tokens = {}
    for split, total in (("train", 70), ("val", 40)):
        images, _ = data.joined(sentences.batches(split, total))
        with torch.no_grad():
            tokens[split] = trained.tokenizer.encode(images.flatten(0, 1)).view(total, IMAGES, -1)
    return SimpleNamespace(given=given, made=made, trained=trained, tokens=tokens, out=out, config=config)


def test_the_backbone_is_trained_on_all_sentences_and_validated_on_others(stages):
    given = stages.given["train_backbone"]
    assert torch.equal(given.train.long(), stages.tokens["train"])
    assert torch.equal(given.val.long(), stages.tokens["val"])
    assert given.codebook_size == 32
    assert given.config == stages.config["gpt"]


def test_the_frozen_backbone_writes_for_the_sentences_of_both_splits(stages):
    given, tokens = stages.given["make_rollouts"], stages.tokens
    assert torch.equal(given.tokens.long(), torch.cat([tokens["train"][:24], tokens["val"]]))
    assert same_weights(given.backbone.state_dict(), stages.made["train_backbone"])
    assert given.batch == stages.config["refiner"].rollout_batch
    for split, rows in (("train", slice(24)), ("val", slice(None))):
        assert torch.equal(stages.trained.tokens[split].long(), tokens[split])
        assert torch.equal(stages.trained.generated[split].long(), tokens[split][rows, 0])


@pytest.mark.parametrize("reading", ["tokens", "tokens+query", "query"])
def test_a_refiner_learns_the_target_of_the_query(stages, reading):
    """Not that of the demonstration; and what it reads is of the same sentences."""
    given, backbone = stages.given[reading], stages.trained.backbone
    assert stages.trained.refiners[reading].reads == tuple(given.reads) == tuple(reading.split("+"))
    assert torch.equal(given.codebook, stages.trained.tokenizer.codebook.vectors)
    for split, rows in (("train", slice(24)), ("val", slice(None))):
        tokens = stages.tokens[split][rows]
        assert not torch.equal(tokens[:, 1], tokens[:, 3])
        assert torch.equal(given.target_tokens[split].long(), tokens[:, 3])
        assert torch.equal(given.rollouts[split].tokens.long(), tokens[:, 0])
        if "query" in reading:
            query = backbone.replay(tokens[:, :3].flatten(1)).query
            assert torch.allclose(given.rollouts[split].query.float(), query, rtol=0.01, atol=0.01)


def test_every_stage_gets_the_seed_and_keeps_what_it_trained(stages):
    trained = {"train_tokenizer": ("tokenizer", stages.trained.tokenizer)}
    trained |= {"train_backbone": ("backbone", stages.trained.backbone)}
    trained |= {name: (f"refiner_{name}", model) for name, model in stages.trained.refiners.items()}
    for name, (file, model) in trained.items():
        assert stages.given[name].seed == 5
        assert stages.given[name].dtype == FLOAT
        assert same_weights(model.state_dict(), stages.made[name])
        assert same_weights(runtime.load_checkpoint(stages.out / f"{file}.pt")["model"], stages.made[name])
    assert not torch.equal(stages.made["tokens"]["norm.weight"], torch.ones(16)), "not as it was at first"


# Layers


@pytest.mark.parametrize("layers", [2, 8])
def test_the_backbone_starts_as_gpt2_does(layers):
    """The layers that write to the residual stream start smaller, the more of them there are."""
    model = GPT(GPTConfig(layers=layers, heads=4, width=64, head_width=16), 200, 16, IMAGES)
    residual = ("attention.out.weight", "mlp.2.weight")
    for name, p in model.named_parameters():
        if p.ndim == 2 and p.numel() > 1000:
            expected = 0.02 / (2 * layers) ** 0.5 if name.endswith(residual) else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.1), name
        elif name.endswith("bias"):
            assert not p.any(), name


@pytest.mark.parametrize("grid", [None, GRID])
def test_dropout_is_on_what_each_half_of_a_block_adds(grid):
    x = torch.randn(50, N, 16)
    for silent in ("attention.out", "mlp.2"):
        block = vsr.Block(16, 2, 0.25, grid)
        for p in block.get_submodule(silent).parameters():
            nn.init.zeros_(p)
        dropped = [(block.train(mode)(x) == x).float().mean().item() for mode in (True, False)]
        assert dropped == pytest.approx([0.25, 0], abs=0.05)


def test_a_model_has_the_dropout_of_its_configuration():
    tokens, embeddings = torch.randint(9, (2, IMAGES * N)), torch.randn(2, N, 5)
    for dropout in (0.0, 0.5):
        backbone = GPT(GPTConfig(layers=1, width=16, dropout=dropout), 9, N, IMAGES)
        refiner = Refiner(RefinerConfig(layers=1, heads=2, width=16, dropout=dropout), ("tokens",), GRID, 5)
        nn.init.normal_(refiner.to_code.weight)
        for model, given in ((backbone, tokens), (refiner, embeddings)):
            assert torch.equal(model.train()(given), model(given)) == (dropout == 0)
            assert torch.equal(model.eval()(given), model(given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_run_in_the_precision_that_was_chosen(dtype):
    with runtime.autocast(CPU, dtype):
        assert nn.Linear(4, 4)(torch.randn(2, 4)).dtype == dtype
