"""Muon: against the one of PyTorch, against a plain loop over the matrices, and what it promises."""

import copy

import pytest
import torch

from train_refiner import Muon

SHAPES = [(24, 8), (24, 8), (8, 24), (16, 16), (24, 8), (40, 10), (16, 16)]
LR, DECAY, MOMENTUM = 0.02, 0.05, 0.95


def matrices(dtype=torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(optimizer, parameters, steps) -> None:
    """Steps with random gradients, the same for every optimizer, and very different in size."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for number, p in enumerate(parameters):
            p.grad = (torch.randn(p.shape, generator=generator) * 10.0 ** (number - 3)).to(p.dtype)
        optimizer.step()


def orthogonalised(update: torch.Tensor) -> torch.Tensor:
    """The five Newton-Schulz steps of Muon, for one matrix: its singular values come near to 1."""
    x = update / update.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def plain_steps(parameters, steps) -> tuple[list, list]:
    """Muon with Nesterov momentum, matrix by matrix: the weights after the steps, and the momentum."""
    weights = [p.detach().clone() for p in parameters]
    momenta = [torch.zeros_like(w) for w in weights]
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for number, (w, m) in enumerate(zip(weights, momenta, strict=True)):
            gradient = (torch.randn(w.shape, generator=generator) * 10.0 ** (number - 3)).to(w.dtype)
            m += (1 - MOMENTUM) * (gradient - m)
            update = orthogonalised((1 - MOMENTUM) * gradient + MOMENTUM * m)
            w *= 1 - LR * DECAY
            w -= LR * 0.2 * max(w.shape) ** 0.5 * update
    return weights, momenta


def momentum_of(optimizer, p) -> torch.Tensor:
    (momentum,) = [x for x in optimizer.state[p].values() if torch.is_tensor(x) and x.shape == p.shape]
    return momentum


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-5 * b.norm())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 is the first with a Muon")
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_muon_is_that_of_pytorch_up_to_its_rounding(dtype, products):
    """PyTorch's orthogonalises in bfloat16, whatever the weights are in."""
    ours, theirs, start = matrices(dtype), matrices(dtype), matrices(dtype)
    options = {"momentum": MOMENTUM, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}
    mine = Muon(ours, lr=LR, weight_decay=DECAY, dtype=products)
    reference = torch.optim.Muon(theirs, lr=LR, weight_decay=DECAY, **options)
    train(mine, ours, range(5))
    train(reference, theirs, range(5))
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert a.dtype == dtype
        moved, expected = (p.detach() - before.detach() for p in (a, b))
        assert torch.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.99
        assert moved.norm() / expected.norm() == pytest.approx(1, abs=0.03)
        assert same(momentum_of(mine, a), reference.state[b]["momentum_buffer"])


def test_stacking_matrices_of_one_shape_changes_nothing():
    parameters = matrices()
    expected, momenta = plain_steps(parameters, range(5))
    optimizer = Muon(parameters, lr=LR, weight_decay=DECAY, momentum=MOMENTUM)
    train(optimizer, parameters, range(5))
    for p, weight, momentum in zip(parameters, expected, momenta, strict=True):
        assert torch.allclose(p, weight, rtol=1e-5, atol=1e-5)
        assert same(momentum_of(optimizer, p), momentum)


def test_the_update_is_nearly_orthogonal_whatever_the_size_of_the_gradient():
    parameters, before = matrices(), matrices()
    train(Muon(parameters, lr=LR, weight_decay=0.0), parameters, range(1))
    for p, start in zip(parameters, before, strict=True):
        singular = torch.linalg.svdvals((start - p).detach()) / (LR * 0.2 * max(p.shape) ** 0.5)
        assert singular.min() > 0.6
        assert singular.max() < 1.3


def test_weight_decay_shrinks_the_weights_by_itself():
    """A gradient of zero changes nothing else, and is no division by zero."""
    parameters, before = matrices(), matrices()
    optimizer = Muon(parameters, lr=LR, weight_decay=DECAY)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, start in zip(parameters, before, strict=True):
        assert torch.allclose(p, start * (1 - LR * DECAY))


def test_a_saved_state_goes_on_to_the_same_weights(tmp_path):
    whole = matrices()
    train(Muon(whole, lr=LR), whole, range(6))
    parameters = matrices()
    first = Muon(parameters, lr=LR)
    train(first, parameters, range(3))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = copy.deepcopy(parameters)
    second = Muon(resumed, lr=99.0)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))


def test_the_rate_of_its_groups_is_the_one_that_counts():
    """`optimizer_step` sets it before each step."""
    for rate in (0.0, LR):
        parameters, before = matrices(), matrices()
        optimizer = Muon(parameters, lr=99.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        train(optimizer, parameters, range(1))
        assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True)) == (rate == 0)
        assert max((a - b).abs().max() for a, b in zip(parameters, before, strict=True)) < 0.1
