"""The checks of the exercises: each says that an answer is right, or in one line what is wrong with it.

A check looks at what every right answer has in common, within tolerances: shapes, values at places where they
are known, which input reaches which output, where gradients go. How the answer was found makes no difference.
"""

import math
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import evaluate
import vsr

WEIGHTS = Path(__file__).parents[2] / "weights" / "toy.pt"


class Wrong(AssertionError):
    """What a check found. A notebook shows the line and, if the answer raised an error, that error."""

    def _render_traceback_(self):  # the name that IPython looks for
        error, lines = self.__cause__, []
        if error is not None:  # from the answer on, without the frame of `call`
            lines = traceback.format_exception(type(error), error, error.__traceback__.tb_next)
        return [*"".join(lines).splitlines(), f"Not right yet: {self}"]


def expect(condition, line: str) -> None:
    if not condition:
        raise Wrong(line)


def call(name: str, function, *arguments, where: str = "", keep: bool = False):
    """Call an answer. Raises Wrong if it is not written, raises, or (keep) has changed an argument."""
    copies = [x.detach().clone() if keep and torch.is_tensor(x) else None for x in arguments]
    try:
        result = function(*arguments)
    except Exception as error:
        if isinstance(error, NotImplementedError) and str(error) in ("", "write me"):
            raise Wrong(f"{name} is not written yet") from None
        reason = (str(error).splitlines() or [""])[0]
        raise Wrong(f"{name} raised {type(error).__name__}{where}: {reason}") from error
    for number, (argument, copy) in enumerate(zip(arguments, copies, strict=True)):
        if copy is not None and not torch.equal(argument, copy):
            raise Wrong(f"{name} changed its argument number {number + 1} in place: work on a copy")
    return result


def as_tensor(name: str, value, shape: tuple, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The value of an answer, if it is a tensor of this shape and type. Raises Wrong, naming what is not."""
    expect(value is not None, f"{name} gave None: is the `return` missing?")
    kind = "tuple" if isinstance(value, tuple) else type(value).__name__
    expect(torch.is_tensor(value), f"{name} gave a {kind}, expected a tensor of shape {shape}")
    expect(tuple(value.shape) == shape, f"{name} gave shape {tuple(value.shape)}, expected {shape}")
    expect(value.dtype == dtype, f"{name} gave {value.dtype}, expected {dtype}")
    return value


def first(mask: torch.Tensor) -> tuple:
    """Where a mask is True for the first time, as a tuple of numbers."""
    return tuple(mask.nonzero()[0].tolist())


def close(a, b, tolerance: float = 1e-4) -> bool:
    """Numbers or tensors are equal within a tolerance, absolute for small ones, relative for large ones."""
    a, b = torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double()
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def diagnose(value, mistakes: list, otherwise: str) -> None:
    """Raise Wrong with the line of the known mistake that gives this value: mistakes [(line, value), ...]."""
    for line, mistaken in mistakes:
        expect(not close(value, mistaken), line)
    raise Wrong(otherwise)


def unit(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


# --------------------------------------------------------------------------------------------------
# 1 to 4: what is measured, the loss, and decoding
# --------------------------------------------------------------------------------------------------


def check_gap_closed(gap_closed) -> None:
    def value(free_running, refined, teacher_forced):
        where = f" for ({free_running}, {refined}, {teacher_forced})"
        result = call("gap_closed", gap_closed, free_running, refined, teacher_forced, where=where)
        try:
            return float(result)
        except (TypeError, ValueError):
            raise Wrong(f"gap_closed gave {result!r}{where}, expected a number") from None

    known = [
        ((0.5, 0.3, 0.1), 0.5, "half of what the true tokens would give is gained"),
        ((0.5, 0.5, 0.1), 0.0, "nothing is gained"),
        ((0.5, 0.1, 0.1), 1.0, "as much is gained as the true tokens would give"),
        ((0.5, 0.05, 0.1), 1.125, "a refiner may be better than teacher forcing, so nothing is cut off at 1"),
        ((0.5, 0.6, 0.1), -0.25, "the refiner made it worse, so the number is below 0"),
        ((5.0, 3.0, 1.0), 0.5, "ten times the errors is the same share"),
        ((1.5, 1.3, 1.1), 0.5, "only what lies between the errors counts, not where they lie"),
    ]
    for errors, expected, meaning in known:
        got = value(*errors)
        if not close(got, expected):
            mistakes = [
                (f"gap_closed{errors} gave {got:.4g}, expected {expected:.4g}: you divide by the "
                 "free-running error, but the "
                 "teacher-forced error is left however good the refiner "
                 "is", (errors[0] - errors[1]) / errors[0]),
                (f"gap_closed{errors} gave {got:.4g}, expected {expected:.4g}: a share, so divide by what "
                 "accumulated",
                 errors[0] - errors[1]),
            ]  # fmt: skip
            diagnose(got, mistakes, f"gap_closed{errors} gave {got:.4g}, expected {expected:.4g}: {meaning}")
    generator = torch.Generator().manual_seed(0)
    for a, r, t in torch.rand(20, 3, generator=generator, dtype=torch.float64).tolist():
        t, a = sorted((t, a))  # the backbone alone is the worse one: something has accumulated
        got, expected = value(a, r, t), (a - r) / (a - t)
        expect(
            close(got, expected),
            f"gap_closed({a:.3f}, {r:.3f}, {t:.3f}) gave {got:.4g}, expected {expected:.4g}",
        )
    try:
        got = value(0.3, 0.2, 0.3)
    except Wrong as wrong:
        raise Wrong(f"{wrong}. Nothing has accumulated there: give NaN (math.nan)") from wrong.__cause__
    expect(
        math.isnan(got),
        f"gap_closed(0.3, 0.2, 0.3) gave {got:.4g}, expected NaN: nothing has accumulated, no share of it "
        "exists",
    )
    print(
        "gap_closed is right: 0 and 1 are where they belong, nothing is cut off, and NaN stands where "
        "nothing accumulated."
    )


def check_cosine_loss(cosine_loss) -> None:
    def value(refined, target):
        return as_tensor("cosine_loss", call("cosine_loss", cosine_loss, refined, target), ())

    generator = torch.Generator().manual_seed(0)
    refined, target = torch.randn(2, 3, 5, generator=generator) * 3, torch.randn(2, 3, 5, generator=generator)
    dot = (refined * target).sum(-1)
    each = 1 - dot / (refined.norm(dim=-1) * target.norm(dim=-1))  # (2, 3)
    got, expected = value(refined, target), each.mean()
    if not close(got, expected):
        flat = 1 - F.cosine_similarity(refined.flatten(), target.flatten(), dim=0)
        mistakes = [
            ("you compare along dim 1, the positions; compare the D numbers of one vector, dim -1",
             (1 - F.cosine_similarity(refined, target)).mean()),
            ("you compare along dim 0, the batch; compare the D numbers of one vector, dim -1",
             (1 - F.cosine_similarity(refined, target, dim=0)).mean()),
            ("you treat a whole batch as one long vector; compare position by position, then take the "
             "mean", flat),
            (f"the loss of 2 x 3 positions is {got.item():.4g}, expected {expected.item():.4g}: the mean, "
             "not the sum",
             each.sum()),
            ("the sign is wrong: equal vectors have cosine 1 and must have loss 0", each.mean() - 1),
            ("that is the mean cosine; the loss is 1 minus it, so that equal vectors have loss "
             "0", 1 - each.mean()),
            ("that is the dot product of vectors of any length: divide by their lengths", (1 - dot).mean()),
            ("that is a squared distance; it grows with the vectors' length, the cosine does "
             "not", F.mse_loss(refined, target)),
        ]  # fmt: skip
        for line, mistaken in mistakes:
            expect(not close(got, mistaken), line)
    for factor, wanted, name in ((1.0, 0.0, "equal"), (-1.0, 2.0, "opposite")):
        got_here = value(target, factor * target).item()
        expect(
            close(got_here, wanted), f"the loss of {name} vectors is {got_here:.4g}, expected {wanted:.4g}"
        )
    longer = value(7 * refined, 3 * target)
    expect(
        close(longer, got),
        f"longer vectors in the same directions change the loss from {got.item():.4g} to {longer.item():.4g}",
    )
    expect(
        close(got, expected),
        f"the loss of random vectors is {got.item():.4g}, expected {expected.item():.4g}",
    )

    with_zero = refined.clone()
    with_zero[1, 2] = 0
    wanted = (each.sum() - each[1, 2] + 1) / 6
    got = value(with_zero, target)
    expect(
        not got.isnan(),
        "a vector of length zero makes the loss nan; its cosine counts as 0: never divide by 0",
    )
    expect(
        close(got, wanted),
        f"with one zero vector the loss is {got.item():.4g}, expected {wanted.item():.4g}: its cosine is 0",
    )

    leaf = refined.clone().requires_grad_()
    loss = value(leaf, target)
    expect(
        loss.requires_grad, "no gradient reaches `refined`: stay with tensors, without .item() or .detach()"
    )
    (slope,) = torch.autograd.grad(loss, leaf)
    after = value(refined - 0.1 * slope, target)
    expect(
        after < loss,
        f"a small step against the gradient raises the loss from {loss.item():.6g} to {after.item():.6g}",
    )
    print(
        "cosine_loss is right: 0 for equal directions, 2 for opposite ones, whatever the lengths, and it has "
        "a gradient."
    )


def check_nearest_code(nearest_code) -> None:
    generator = torch.Generator().manual_seed(0)

    def check(embeddings, codebook, mistakes=()):
        where = f" for embeddings {tuple(embeddings.shape)} and codebook {tuple(codebook.shape)}"
        tokens = call("nearest_code", nearest_code, embeddings, codebook, where=where)
        tokens = as_tensor("nearest_code", tokens, tuple(embeddings.shape[:-1]), torch.int64)
        V = len(codebook)
        outside = (tokens < 0) | (tokens >= V)
        expect(
            not outside.any(),
            f"nearest_code gave a token outside the codebook, which has the codes 0 to {V - 1}",
        )
        cosine = F.normalize(embeddings, dim=-1) @ F.normalize(codebook, dim=-1).T  # (..., V)
        chosen = cosine.gather(-1, tokens[..., None])[..., 0]
        worse = chosen < cosine.amax(-1) - 1e-5
        if worse.any():
            for line, mistaken in mistakes:
                expect(not torch.equal(tokens, mistaken), line)
            at = first(worse)
            token, best = tokens[at].item(), cosine[at].argmax().item()
            raise Wrong(
                f"position {at}: you chose code {token} with cosine {chosen[at].item():.3f}, but code {best} "
                "has "
                f"{cosine[at][best].item():.3f}"
            )

    embeddings = torch.randn(4, 6, 5, generator=generator)
    codebook = torch.randn(11, 5, generator=generator) * torch.linspace(0.3, 4, 11)[:, None]
    cosine = F.normalize(embeddings, dim=-1) @ F.normalize(codebook, dim=-1).T
    mistakes = [
        ("you take the largest dot product, and long codes win it: give all codes the same length first",
         (embeddings @ codebook.T).argmax(-1)),
        ("you take the smallest distance, which depends on the lengths: give embeddings and codes unit norm "
         "first",
         torch.cdist(embeddings, codebook.expand(4, 11, 5)).argmin(-1)),
        ("you take the code that is farthest: the largest cosine is wanted", cosine.argmin(-1)),
    ]  # fmt: skip
    check(embeddings, codebook, mistakes)
    check(codebook, codebook)  # each code is nearest to itself
    check(embeddings * 100, codebook)
    check(embeddings[0, 0], codebook)
    check(embeddings[None], codebook)
    check(embeddings, codebook[:1])
    check(torch.zeros(2, 5), codebook)  # all cosines are 0: any code will do
    check(embeddings, torch.cat([codebook, codebook]))  # ties: either will do
    print(
        "nearest_code is right: the largest cosine, for embeddings and codes of any length and any leading "
        "shape."
    )


def check_exposure_removed(exposure_removed, base_error_removed) -> None:
    def value(function, name, *errors):
        where = f" for {errors}"
        result = call(name, function, *errors, where=where)
        try:
            return float(result)
        except (TypeError, ValueError):
            raise Wrong(f"{name} gave {result!r}{where}, expected a number") from None

    def nothing_to_remove(function, name, errors, why):
        try:
            got = value(function, name, *errors)
        except Wrong as wrong:
            raise Wrong(f"{wrong}. {why.capitalize()}: give NaN (math.nan)") from wrong.__cause__
        expect(math.isnan(got), f"{name}{errors} gave {got:.4g}, expected NaN: {why}")

    known = [  # F, F', T, T'
        ((0.5, 0.5, 0.1, 0.1), 0.0, "a refiner that changes nothing removes nothing"),
        ((0.5, 0.0, 0.1, 0.0), 1.0, "one that returns the truth removes all of it"),
        ((0.5, 0.3, 0.1, 0.1), 0.5, "half of what accumulated is left"),
        ((0.5, 0.2, 0.1, 0.0), 0.5, "what is gained after true tokens too had not accumulated"),
        ((0.5, 0.2, 0.1, 0.2), 1.0, "equal answers for both images: nothing of what accumulated is left"),
        ((0.5, 0.9, 0.1, 0.9), 1.0, "equal answers for both images remove all of it, however bad they are"),
        ((0.5, 0.05, 0.1, 0.1), 1.125, "more than all is possible, so nothing is cut off at 1"),
        ((0.5, 0.6, 0.1, 0.1), -0.25, "there is more of it after refining, so the number is below 0"),
        ((5.0, 3.0, 1.0, 1.0), 0.5, "ten times the errors is the same part"),
    ]
    random = torch.rand(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    for a, b, c, d in random:
        F_, T_ = max(a, c), min(a, c)  # something has accumulated
        known.append(((F_, b, T_, d), 1 - (b - d) / (F_ - T_), "1 - (F' - T') / (F - T)"))
    mistakes = [
        ("that is gap closed, in which refined_forced does not count",
         lambda a, r, t, rt: (a - r) / (a - t)),
        ("that is the part that is left; 1 minus it is gone", lambda a, r, t, rt: (r - rt) / (a - t)),
        ("you divide by the free-running error; divide by what accumulated, F - T",
         lambda a, r, t, rt: 1 - (r - rt) / a),
        ("a part, so divide by what accumulated, F - T", lambda a, r, t, rt: (a - t) - (r - rt)),
    ]  # fmt: skip
    got = [value(exposure_removed, "exposure_removed", *errors) for errors, _, _ in known]
    for number, (errors, expected, meaning) in enumerate(known):
        if not close(got[number], expected):
            line = f"exposure_removed({', '.join(f'{x:.4g}' for x in errors)}) gave {got[number]:.4g}, "
            line += f"expected {expected:.4g}: "
            for mistake, formula in mistakes:
                explained = [close(g, formula(*errors)) for g, (errors, _, _) in zip(got, known, strict=True)]
                expect(not all(explained), line + mistake)
            raise Wrong(line + meaning)
    why = "nothing has accumulated, no part of it exists"
    nothing_to_remove(exposure_removed, "exposure_removed", (0.3, 0.2, 0.3, 0.2), why)
    nothing_to_remove(exposure_removed, "exposure_removed", (0.2, 0.2, 0.3, 0.1), why)
    print("exposure_removed is right: 0 for no change, 1 for the truth, and 1 for whoever does not look.")

    known = [
        ((0.2, 0.2), 0.0, "nothing is removed"),
        ((0.2, 0.05), 0.75, "a quarter of it is left"),
        ((0.2, 0.0), 1.0, "all of it is removed"),
        ((0.2, 0.3), -0.5, "it became more, so the number is below 0"),
    ]
    for errors, expected, meaning in known:
        got = value(base_error_removed, "base_error_removed", *errors)
        said = f"base_error_removed{errors} gave {got:.4g}, expected {expected:.4g}: "
        if not close(got, expected):
            t, rt = errors
            mistakes = [
                (said + "a part, so divide by T", t - rt),
                (said + "that is the part that is left; 1 minus it is gone", rt / t),
            ]
            diagnose(got, mistakes, said + meaning)
    nothing_to_remove(base_error_removed, "base_error_removed", (0.0, 0.1), "there is no error to remove")
    print("base_error_removed is right: the part of the error after true tokens that is gone.")


# --------------------------------------------------------------------------------------------------
# 5: the causal mask
# --------------------------------------------------------------------------------------------------


def check_causal_mask(causal_mask, causal_softmax) -> None:
    for T in (6, 1, 2):
        mask = as_tensor(
            "causal_mask", call("causal_mask", causal_mask, T, where=f" for T = {T}"), (T, T), torch.bool
        )
        later = mask.triu(1)
        hidden = ~mask & torch.ones(T, T, dtype=torch.bool).tril()
        if (
            T == 6
            and later.any()
            and hidden.any()
            and torch.equal(mask, torch.ones(T, T, dtype=torch.bool).triu(1))
        ):
            raise Wrong("your mask is True where it must be False: True means that the query may see the key")
        if later.any():
            t, s = first(later)
            raise Wrong(f"your mask lets position {t} see position {s}, which comes later")
        if hidden.any():
            t, s = first(hidden)
            raise Wrong(
                f"your mask hides position {s} from "
                + ("itself" if t == s else f"position {t}, which comes later")
            )
    print("causal_mask is right: every position sees itself and all before it, nothing after.")

    generator = torch.Generator().manual_seed(0)
    for B, H, T in ((2, 3, 6), (1, 1, 1)):
        scores = torch.randn(B, H, T, T, generator=generator) * 2
        weights = call(
            "causal_softmax", causal_softmax, scores, where=f" for scores {(B, H, T, T)}", keep=True
        )
        weights = as_tensor("causal_softmax", weights, (B, H, T, T))
        expect(not weights.isnan().any(), "causal_softmax gave nan: every query sees at least itself")
        later = weights.abs().triu(1) > 1e-6
        if later.any():
            b, h, t, s = first(later)
            raise Wrong(
                f"your weights let position {t} see position {s} (weight {weights[b, h, t, s].item():.3f}): "
                "a score of 0 is not a weight of 0"
            )
        sums = weights.sum(-1)  # (B, H, T)
        off = (sums - 1).abs() > 1e-4
        if off.any():
            if close(weights.sum(-2), torch.ones(B, H, T)):
                raise Wrong(
                    "your softmax runs over the queries: each column sums to 1, not each row. It runs over "
                    "the keys, dim -1"
                )
            b, h, t = first(off)
            raise Wrong(
                f"the weights of position {t} sum to {sums[b, h, t].item():.3f}, expected 1: hide the scores "
                "before the "
                "softmax, not the weights after it"
            )
        for t in range(T):
            wanted = scores[:, :, t, : t + 1].softmax(-1)  # (B, H, t+1)
            off = (weights[:, :, t, : t + 1] - wanted).abs() > 1e-4
            if off.any():
                b, h, s = first(off)
                raise Wrong(
                    f"position {t} gives position {s} the weight {weights[b, h, t, s].item():.3f}, expected "
                    f"{wanted[b, h, s].item():.3f}: the softmax of its scores for the positions 0 to {t}"
                )
    print("causal_softmax is right: each row sums to 1 over what its query may see.")


# --------------------------------------------------------------------------------------------------
# 6 and 7: how the tokenizer learns through its codebook
# --------------------------------------------------------------------------------------------------


def check_straight_through(straight_through) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 3, 4), (5,)):
        z, e, upstream = [torch.randn(*shape, generator=generator) for _ in range(3)]
        z.requires_grad_()
        e.requires_grad_()
        quantized = as_tensor("straight_through", call("straight_through", straight_through, z, e), shape)
        if not close(quantized, e):
            diagnose(
                quantized,
                [("forwards it gives z; the decoder has to see the code e", z)],
                f"forwards it must give e: at {first((quantized - e).abs() > 1e-4)} it gave another number",
            )
        expect(
            quantized.requires_grad,
            "no gradient at all goes back: the encoder would never learn. z has to be in the sum",
        )
        to_z, to_e = torch.autograd.grad(quantized, (z, e), upstream, allow_unused=True)
        reached = to_z is not None and bool(to_z.abs().max() > 1e-6)
        expect(
            reached, "no gradient reaches z: the encoder would never learn. Backwards, the result has to be z"
        )
        if not close(to_z, upstream):
            at = first((to_z - upstream).abs() > 1e-4)
            raise Wrong(
                f"the gradient of z at {at} is {to_z[at].item():.3f}, expected {upstream[at].item():.3f}, "
                "that of the result: "
                "backwards it has to be the identity"
            )
        if to_e is not None and to_e.abs().max() > 1e-6:
            raise Wrong(
                "a gradient also reaches e: the reconstruction would move the codes. Stop it with .detach()"
            )
    print(
        "straight_through is right: forwards the code, backwards the identity on z, and the codes are left "
        "alone."
    )


def check_commitment_loss(vq_losses) -> None:
    generator = torch.Generator().manual_seed(0)
    z, e = (
        torch.randn(4, 6, 5, generator=generator).requires_grad_(),
        torch.randn(4, 6, 5, generator=generator).requires_grad_(),
    )
    M, D = 24, 5
    result = call("vq_losses", vq_losses, z, e)
    pair = isinstance(result, tuple | list) and len(result) == 2
    expect(pair, "vq_losses gave something else than a pair: return codebook_loss, commitment_loss")
    losses = {"codebook loss": result[0], "commitment loss": result[1]}
    distance = (z - e).detach().square().sum(-1)  # (4, 6)
    for name, loss in losses.items():
        as_tensor(f"the {name}", loss, ())
        if not close(loss, distance.mean()):
            mistakes = [
                (f"the {name} is {D} times too small: sum over the D = {D} numbers of a vector, then the "
                 "mean over vectors",
                 distance.mean() / D),
                (f"the {name} is {M} times too large: take the mean over the {M} vectors, not the "
                 "sum", distance.sum()),
                (f"the {name} is the mean distance; its square is wanted", distance.sqrt().mean()),
            ]  # fmt: skip
            wanted = distance.mean().item()
            line = f"the {name} is {loss.item():.4g}, expected {wanted:.4g}, the mean of |z - e|^2"
            if loss < distance.mean():
                line += "; leave the weights 0.1 and beta to the training loop"
            diagnose(loss, mistakes, line)
    slopes = {}
    for name, loss in losses.items():
        expect(
            loss.requires_grad, f"the {name} has no gradient: stop one side of it with .detach(), not both"
        )
        pair = torch.autograd.grad(loss, (z, e), retain_graph=True, allow_unused=True)
        slopes[name] = [torch.zeros_like(z) if slope is None else slope for slope in pair]
    moves = {name: [bool(slope.abs().max() > 1e-7) for slope in pair] for name, pair in slopes.items()}
    if moves == {"codebook loss": [True, False], "commitment loss": [False, True]}:
        raise Wrong(
            "the two are swapped: the codebook loss comes first and moves e, the commitment loss moves z"
        )
    expect(
        not moves["codebook loss"][0],
        "your codebook loss moves the encoder's output z: put the stop-gradient on z",
    )
    expect(
        not moves["commitment loss"][1], "your commitment loss moves the codes e: put the stop-gradient on e"
    )
    expect(
        moves["codebook loss"][1],
        "your codebook loss does not move the codes e: the stop-gradient belongs on z",
    )
    expect(
        moves["commitment loss"][0], "your commitment loss does not move z: the stop-gradient belongs on e"
    )
    wanted = 2 * (e - z).detach() / M
    right = close(slopes["codebook loss"][1], wanted) and close(slopes["commitment loss"][0], -wanted)
    expect(right, "the values are right, but their gradients are not those of |z - e|^2")
    print("vq_losses is right: two equal numbers, of which one moves the codes and the other the encoder.")


# --------------------------------------------------------------------------------------------------
# 8: attention in a window
# --------------------------------------------------------------------------------------------------


def check_window_mask(window_mask) -> None:
    for grid, radius in (((5, 8), 1), ((5, 8), 0), ((4, 3), 1), ((4, 5), 2), ((2, 3), 5), ((1, 1), 0)):
        (h, w), N = grid, grid[0] * grid[1]
        row, column = torch.arange(N) // w, torch.arange(N) % w
        down, across = (row[:, None] - row).abs(), (column[:, None] - column).abs()  # (N, N)
        wanted = torch.maximum(down, across) <= radius
        given = f"grid {grid}, radius {radius}"
        mask = call("window_mask", window_mask, grid, radius, where=f" for {given}")
        mask = as_tensor("window_mask", mask, (N, N))
        shown, hidden = mask == 0, mask == -torch.inf
        if torch.equal(hidden, wanted) and torch.equal(shown, ~wanted):
            raise Wrong("0 and -inf are the wrong way round: 0 lets the key be seen, -inf hides it")
        if not (shown | hidden).all():
            t, s = first(~(shown | hidden))
            raise Wrong(
                f"{given}: entry [{t}, {s}] is {mask[t, s].item():.4g}. The mask is added to the scores: 0 "
                "where the key may be seen, -inf elsewhere"
            )

        def place(t, row=row, column=column):
            return f"position {t} (row {row[t]}, column {column[t]})"

        too_many, missing = shown & ~wanted, hidden & wanted
        swapped = torch.maximum((torch.arange(N) % h - (torch.arange(N) % h)[:, None]).abs(),
                                (torch.arange(N) // h - (torch.arange(N) // h)[:, None]).abs())  # fmt: skip
        if h != w and not torch.equal(shown, wanted) and torch.equal(shown, swapped <= radius):
            raise Wrong(f"{given}: rows and columns are mixed up. Position t lies in row t // w, and w = {w}")
        wrapped = too_many & (torch.minimum(down, h - down) <= radius)
        wrapped &= torch.minimum(across, w - across) <= radius
        if too_many.any():
            t, s = first(too_many)
            line = f"{given}: {place(t)} sees {place(s)}: "
            raster = (torch.arange(N)[:, None] - torch.arange(N)).abs() <= radius
            if torch.equal(too_many & raster, too_many):
                line += "neighbours in the raster need not be neighbours in the image"
            elif torch.equal(wrapped, too_many):
                line += "nothing goes on beyond the border"
            else:
                line += f"{down[t, s]} down and {across[t, s]} across, and both count"
            raise Wrong(line)
        if missing.any():
            if missing.diagonal().any():
                raise Wrong(f"{given}: {place(first(missing.diagonal())[0])} does not see itself")
            t, s = first(missing)
            line = f"{given}: {place(t)} does not see {place(s)}: "
            if torch.equal(missing, wanted & (torch.arange(N)[:, None] < torch.arange(N))):
                line += "the refiner is not causal, later positions count too"
            elif not (missing & ((down == 0) | (across == 0))).any():
                line += f"{down[t, s]} down and {across[t, s]} across. Each counts on its own: a square"
            else:
                line += f"{down[t, s]} down and {across[t, s]} across, and neither is more than {radius}"
            raise Wrong(line)
    print("window_mask is right: rows and columns count, the raster does not, and nothing wraps around.")


# --------------------------------------------------------------------------------------------------
# 9: edges
# --------------------------------------------------------------------------------------------------


def check_sobel_edges(sobel_edges) -> None:
    def strengths(images, what):
        """The channel of the map that all three have to be, from -1..1 back to strengths 0..1: (B, H, W)"""
        where = f" for images {tuple(images.shape)}"
        maps = as_tensor(
            "sobel_edges",
            call("sobel_edges", sobel_edges, images, where=where, keep=True),
            tuple(images.shape),
        )
        expect(not maps.isnan().any(), f"the map of {what} has nan in it")
        if (maps.amax(1) - maps.amin(1)).max() > 1e-5:
            raise Wrong(f"the three channels of the map of {what} differ: repeat the largest of the three")
        outside = (maps < -1 - 1e-5) | (maps > 1 + 1e-5)
        expect(
            not outside.any(),
            f"the map of {what} reaches {maps.abs().max().item():.3g}: strengths end at 1, maps lie in [-1, "
            "1]",
        )
        return (maps[:, 0] + 1) / 2

    def check(got, wanted, what, mistakes=()):
        """wanted: strengths (H, W), nan where nothing is asked"""
        off = (got - wanted).abs() > 1e-4  # False at nan
        if off.any():
            for line, mistaken in mistakes:
                expect(not close(got[~wanted.isnan()], mistaken[~wanted.isnan()]), line)
            y, x = first(off)
            raise Wrong(
                f"{what}: at row {y}, column {x} the edge has strength {got[y, x].item():.3f}, expected "
                f"{wanted[y, x].item():.3f}"
            )

    S = 8
    zeros, nan = torch.zeros(S, S), torch.full((S, S), math.nan)
    flat = torch.tensor([0.8, -0.3, 0.5])[None, :, None, None].expand(2, 3, S, S).contiguous()
    got = strengths(flat, "a flat image")[0]
    expect(
        not close(got, zeros + 0.5),
        "a flat image gives 0, expected -1: the strength s from 0 to 1 becomes 2 s - 1",
    )
    if (got[0].abs().max() > 1e-4 or got[-1].abs().max() > 1e-4) and got[1:-1, 1:-1].abs().max() < 1e-4:
        x = int(got[0].abs().argmax())
        raise Wrong(
            f"a flat image has an edge of strength {got[0, x].item():.2f} at its border (row 0, column {x}): "
            "outside the image "
            "its border pixels are repeated, not zeros"
        )
    check(got, zeros, "a flat image")

    x = torch.arange(S).float()
    step = torch.where(x < 4, -0.1, 0.2)[None, :].expand(S, S)  # a step of 0.3 between the columns 3 and 4
    wanted = zeros.clone()
    wanted[:, 3:5] = 0.3
    mistakes = [
        (
            f"a vertical step of height 0.3: strength {0.3 * k:.2f} instead of 0.30: {line}",
            (wanted * k).clamp(max=1),
        )
        for k, line in (
            (4, "divide the kernels by 4"),
            (2, "divide by 4, not by 2"),
            (0.5, "divide by 4, not by 8"),
        )
    ]
    mistakes.append(
        ("a vertical step of height 0.3: strength 0.09 instead of 0.30: take the square root", wanted**2)
    )
    check(
        strengths(step.expand(1, 3, S, S), "a vertical step")[0],
        wanted,
        "a vertical step of height 0.3",
        mistakes,
    )
    check(
        strengths(step.T.expand(1, 3, S, S), "a horizontal step")[0],
        wanted.T,
        "a horizontal step of height 0.3",
    )
    high = torch.where(step < 0, -1.0, 1.0).expand(1, 3, S, S)
    check(
        strengths(high, "a step of height 2")[0],
        wanted.gt(0).float(),
        "a step of height 2, whose strength ends at 1",
    )

    ramp = 0.03 * x[None, :] + 0.04 * x[:, None]
    wanted = nan.clone()
    wanted[1:-1, 1:-1] = 0.1
    mistakes = [
        (
            "a slope across and down at once: you add |g_x| and |g_y|; the length is sqrt(g_x^2 + g_y^2)",
            wanted * 1.4,
        ),
        (
            "a slope across and down at once: you take the larger of |g_x| and |g_y|; the length is wanted",
            wanted * 0.8,
        ),
        ("a slope across and down at once: take the square root of g_x^2 + g_y^2", wanted**2),
    ]
    check(
        strengths(ramp.expand(1, 3, S, S), "a slope")[0],
        wanted,
        "a slope of 0.03 across and 0.04 down",
        mistakes,
    )

    dot = zeros.clone()
    dot[4, 4] = 0.4
    wanted = zeros.clone()
    wanted[3:6, 3:6] = torch.tensor([[2**0.5, 2, 2**0.5], [2, 0, 2], [2**0.5, 2, 2**0.5]]) / 10
    check(
        strengths(dot.expand(1, 3, S, S), "one bright pixel")[0],
        wanted,
        "one pixel of 0.4 (the kernels' weights are 1 2 1)",
    )

    image = torch.zeros(1, 3, S, S)
    image[0, 0], image[0, 1] = step, -step * 2 / 3
    wanted = zeros.clone()
    wanted[:, 3:5] = 0.3
    grey = [
        ("a step in red against a step in green vanishes in part: take the edges of each channel, not of "
         "their mean",
         strengths(image.mean(1, keepdim=True).expand(1, 3, S, S), "a grey image")[0]),
        ("a step in red against a step in green vanishes in part: take the edges of each channel, not of the "
         "grey image",
         strengths(data.grey(image), "a grey image")[0]),
        ("a step in red (0.3) and one in green (0.2): take the largest channel, not the sum", wanted * 5 / 3),
        ("a step in red (0.3) and one in green (0.2): take the largest channel, not the "
         "mean", wanted * 5 / 9),
    ]  # fmt: skip
    check(strengths(image, "a coloured step")[0], wanted, "a step of 0.3 in red and of -0.2 in green", grey)
    image[0, 0], image[0, 1] = 0.03 * x[None, :], 0.04 * x[:, None]
    wanted = nan.clone()
    wanted[1:-1, 1:-1] = 0.08
    check(
        strengths(image, "two slopes")[0],
        wanted,
        "red slopes across, green slopes down (the length first, then the channel)",
    )

    images = torch.rand(2, 3, S, S + 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    both = strengths(images, "noise")
    alone = strengths(images[1:], "noise")[0]
    expect(close(both[1], alone), "an image's edges depend on the other images of the batch")
    turned = strengths(images.transpose(2, 3).contiguous(), "noise on its side").transpose(1, 2)
    expect(close(both, turned), "an image on its side has other edges: is g_y the transposed g_x?")
    print(
        "sobel_edges is right: flat is black, steps have their height, each channel counts, and nothing "
        "exceeds 1."
    )


# --------------------------------------------------------------------------------------------------
# 10: top-p sampling
# --------------------------------------------------------------------------------------------------


def check_top_p(top_p_probabilities) -> None:
    def check(logits, top_p):
        B, V = logits.shape
        what = f"top_p = {top_p:g}"
        result = call(
            "top_p_probabilities",
            top_p_probabilities,
            logits,
            top_p,
            where=f" for {B} x {V} logits, {what}",
            keep=True,
        )
        result = as_tensor("top_p_probabilities", result, (B, V))
        p = logits.softmax(-1)
        for row, (kept_p, full) in enumerate(zip(result, p, strict=True)):
            expect(
                not kept_p.isnan().any(),
                f"{what}, row {row}: nan. Was nothing kept? The likeliest token always is",
            )
            expect((kept_p >= 0).all(), f"{what}, row {row}: a probability is below 0")
            kept = kept_p > 0
            expect(kept.any(), f"{what}, row {row}: no token is kept. The likeliest always is")
            dropped_best = torch.where(kept, -1, full)
            kept_least = torch.where(kept, full, 2)
            a, b = int(dropped_best.argmax()), int(kept_least.argmin())
            expect(
                full[a] <= full[b] + 1e-6 or kept.all(),
                f"{what}, row {row}: token {a} (probability {full[a]:.3f}) is dropped and token {b} "
                f"({full[b]:.3f}) is kept: "
                "are the sorted tokens back in their own order, row by row?",
            )
            mass = full[kept].sum().item()
            expect(
                mass >= top_p - 1e-5,
                f"{what}, row {row}: the tokens {kept.nonzero().flatten().tolist()} are kept, {mass:.3f} in "
                "all, less than "
                "top_p: the token that reaches top_p is kept too",
            )
            before = mass - full[b].item()
            expect(
                kept.sum() == 1 or before < top_p + 1e-5,
                f"{what}, row {row}: token {b} is kept, although the likelier ones make up {before:.3f}, "
                "which is top_p already",
            )
            total = kept_p.sum().item()
            expect(
                abs(total - 1) < 1e-4,
                f"{what}, row {row}: the probabilities sum to {total:.3f}: divide by the sum of the kept",
            )
            wanted = torch.where(kept, full, 0.0) / mass
            off = (kept_p - wanted).abs() > 1e-4
            if off.any():
                (v,) = first(off)
                raise Wrong(
                    f"{what}, row {row}: token {v} has probability {kept_p[v]:.3f}, expected "
                    f"{wanted[v]:.3f}: the kept tokens "
                    "keep their proportions"
                )

    three = torch.tensor([[0.2, 0.5, 0.3]]).log()
    for top_p in (0.51, 0.49, 0.79, 0.81, 0.99, 1.0, 1e-6):
        check(three, top_p)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator) * 2
    for top_p in (0.3, 0.6, 0.9, 1.0, 1e-6):
        check(logits, top_p)
    check(torch.zeros(2, 5), 0.5)  # ties: any three of the five
    check(torch.tensor([[0.4, 0.4, 0.2]]).log(), 0.3)
    check(torch.randn(3, 1, generator=generator), 0.5)
    check(torch.tensor([[1.0, -torch.inf, 0.5, 0.0]]), 0.9)
    check(logits + 100, 0.7)
    print(
        "top_p_probabilities is right: the fewest likeliest tokens that reach top_p, in their old "
        "proportions."
    )


# --------------------------------------------------------------------------------------------------
# 11: LoRA
# --------------------------------------------------------------------------------------------------


def check_lora_layer(LoRALinear) -> None:
    torch.manual_seed(0)
    for bias in (True, False):
        linear = nn.Linear(5, 3, bias=bias)
        W, b = linear.weight.detach().clone(), linear.bias.detach().clone() if bias else None
        layer = call(
            "LoRALinear", LoRALinear, linear, 2, where=f" for nn.Linear(5, 3, bias={bias}) and rank 2"
        )
        for name, shape in (("A", (2, 5)), ("B", (3, 2))):
            value = getattr(layer, name, None)
            expect(isinstance(value, nn.Parameter), f"the layer has no nn.Parameter named {name}")
            expect(
                tuple(value.shape) == shape,
                f"{name} has shape {tuple(value.shape)}, expected {shape} for (out, in) = (3, 5), rank 2",
            )
        A, B = layer.A, layer.B
        x = torch.randn(2, 4, 5)
        original = F.linear(x, W, b)

        def output(layer=layer, x=x):
            return as_tensor(
                "forward", call("forward", layer, x, where=f" for x {tuple(x.shape)}", keep=True), (2, 4, 3)
            )

        off = (output() - original).abs().max().item()
        expect(
            off < 1e-5,
            f"before training the layer is off from the linear layer by up to {off:.3g}: B has to start at "
            "zero",
        )
        expect(
            (A != 0).any() or (B != 0).any(),
            "A and B both start at zero, so neither ever gets a gradient: A starts at random",
        )
        expect(not B.any(), "B starts at zero and A at random: you have them the other way round")
        expect(
            A.std() > 1e-3,
            "the numbers of A are all the same: rank 1 is all it can learn; draw them at random",
        )

        trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
        missing = {"A", "B"} - trained
        expect(not missing, f"{', '.join(sorted(missing))} is frozen: A and B are what learns")
        extra = sorted(trained - {"A", "B"})
        expect(
            not extra,
            f"{', '.join(extra)} would be trained as well: freeze the linear layer (requires_grad_(False))",
        )

        with torch.no_grad():
            A.copy_(torch.randn_like(A))
            B.copy_(torch.randn_like(B))
        got, wanted = output(), original + x @ A.T @ B.T
        if not close(got, wanted):
            mistakes = [
                (
                    "the result does not change with A and B: the product B A is missing from forward",
                    original,
                ),
                ("the linear layer's own output is missing: W x + b, plus the low-rank part", x @ A.T @ B.T),
                ("the bias is missing", wanted - (0 if b is None else b)),
            ]
            off = (got - wanted).abs().max().item()
            diagnose(
                got,
                mistakes,
                f"with random A and B the result is off by up to {off:.3g} from (W + B A) x + b, without any "
                "scale",
            )
        slopes = torch.autograd.grad(got.square().sum(), (A, B), allow_unused=True)
        for name, slope in zip("AB", slopes, strict=True):
            expect(
                slope is not None and slope.abs().max() > 0,
                f"no gradient reaches {name}: is it detached, or copied, in forward?",
            )

        before = output().detach()
        merged = call("merged", layer.merged)
        expect(isinstance(merged, nn.Linear), f"merged gave a {type(merged).__name__}, expected an nn.Linear")
        after = output().detach()
        off = (after - before).abs().max().item()
        expect(
            off < 1e-5,
            f"merged changed the layer itself, by up to {off:.3g}: write into a new nn.Linear, not into the "
            "old weight",
        )
        expect(torch.equal(linear.weight, W), "the weight of the linear layer has changed: it is frozen")
        expect(
            (merged.bias is None) == (b is None),
            "the merged layer has a bias and the linear one has not, or the other way round",
        )
        off = (merged(x) - before).abs().max().item()
        expect(
            off < 1e-4,
            f"the merged layer is off by up to {off:.3g} from the layer: its weight is W + B A, its bias b",
        )
        # Merged layers live on their own: another adapter, or more training, must not reach them.
        with torch.no_grad():
            B.zero_()
        expect(close(merged(x), before), "the merged layer still changes with B: copy the values")
    print(
        "LoRALinear is right: it starts as the linear layer, only A and B learn, and it merges into an "
        "ordinary layer."
    )


# --------------------------------------------------------------------------------------------------
# 12: confidence-gated refinement
# --------------------------------------------------------------------------------------------------


class Simulated(NamedTuple):
    """Tokens and refined embeddings as a refiner that is right most of the time might give them."""

    tokens: torch.Tensor  # (B, N) long, y_q
    refined: torch.Tensor  # (B, N, D) unit norm, e'_seq
    truth: torch.Tensor  # (B, N) long, y*
    codebook: torch.Tensor  # (V, D) unit norm


def simulated_refinement(seed: int = 0, B: int = 64, N: int = 16, V: int = 24, D: int = 8) -> Simulated:
    """A backbone with a quarter of the tokens wrong, and a refiner that points to the truth, with noise."""
    generator = torch.Generator().manual_seed(seed)
    codebook = unit(V, D, generator=generator)
    truth = torch.randint(V, (B, N), generator=generator)
    mistaken = torch.rand(B, N, generator=generator) < 0.25
    tokens = torch.where(mistaken, torch.randint(V, (B, N), generator=generator), truth)
    noise = torch.randn(B, N, D, generator=generator) * 0.45
    return Simulated(
        tokens, F.normalize(codebook[tokens] * 0.3 + codebook[truth] + noise, dim=-1), truth, codebook
    )


def check_gated_refinement(gated_refine, choose_threshold) -> None:
    def check(case, threshold):
        tokens, refined, _, codebook = case
        where = (
            f" for tokens {tuple(tokens.shape)}, codebook {tuple(codebook.shape)} and threshold {threshold}"
        )
        got = call("gated_refine", gated_refine, tokens, refined, codebook, threshold, where=where, keep=True)
        got = as_tensor("gated_refine", got, tuple(tokens.shape), torch.int64)
        cosine = refined @ codebook.T  # (B, N, V)
        best, nearest = cosine.max(-1)
        margin = best - cosine.gather(-1, tokens[..., None])[..., 0]
        sure, unsure = margin > threshold + 1e-5, margin < threshold - 1e-5
        either = (got == tokens) | (
            cosine.gather(-1, got.clamp(0, len(codebook) - 1)[..., None])[..., 0] > best - 1e-5
        )
        if not either.all():
            at = first(~either)
            raise Wrong(
                f"threshold {threshold}, position {at}: you gave code {got[at].item()}, which is neither the "
                "backbone's token "
                f"{tokens[at].item()} nor the code nearest to the refined embedding, {nearest[at].item()}"
            )
        missed, forced = sure & (got == tokens), unsure & (got != tokens)
        if (
            missed.any()
            and forced.any()
            and close(missed.sum() + forced.sum(), (sure | unsure)[nearest != tokens].sum())
        ):
            raise Wrong(
                "you keep the tokens whose margin is above the threshold and replace the others: it is the "
                "other way round"
            )
        if missed.any():
            at = first(missed)
            raise Wrong(
                f"threshold {threshold}, position {at}: the margin {margin[at].item():.3f} is above the "
                "threshold, but the "
                f"backbone's token {tokens[at].item()} is kept"
            )
        if forced.any():
            at = first(forced)
            raise Wrong(
                f"threshold {threshold}, position {at}: the margin {margin[at].item():.3f} (cosine "
                f"{best[at].item():.3f} to "
                f"the nearest code, {(best - margin)[at].item():.3f} to the backbone's) is below the "
                "threshold, but the token "
                "was replaced"
            )

    case = simulated_refinement()
    for threshold in (0.2, 0.0, 0.05, 0.5, 1.0, 2.0):
        check(case, threshold)
    lonely = torch.ones(1, 8) / 8**0.5
    check(Simulated(torch.zeros(2, 3, dtype=torch.long), case.refined[:2, :3], None, lonely), 0.1)
    print("gated_refine is right: each position is judged by its own margin.")

    thresholds = [0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 2.0]
    for seed in range(3):
        tokens, refined, truth, codebook = case = simulated_refinement(seed + 1)
        if seed == 1:  # a refiner that is nearly always right: the gate only gets in its way
            refined = F.normalize(codebook[truth] + 0.1 * refined, dim=-1)
        if seed == 2:  # one that knows nothing: best is to change nothing
            refined = F.normalize(0.5 * codebook[tokens] + refined.roll(1, 0), dim=-1)
        errors, right = [], []
        for threshold in thresholds:
            cosine = refined @ codebook.T
            best, nearest = cosine.max(-1)
            y = torch.where(best - cosine.gather(-1, tokens[..., None])[..., 0] > threshold, nearest, tokens)
            errors.append(vsr.cosine_error(y, truth, codebook).mean().item())
            right.append((y == truth).float().mean().item())
        got = call(
            "choose_threshold", choose_threshold, thresholds, tokens, refined, truth, codebook, keep=True
        )
        expect(got is not None, "choose_threshold gave None: is the `return` missing?")
        try:
            got = float(got)
        except (TypeError, ValueError):
            raise Wrong(f"choose_threshold gave {got!r}, expected one of the thresholds") from None
        at = [i for i, threshold in enumerate(thresholds) if abs(threshold - got) < 1e-6]
        best = min(range(len(errors)), key=errors.__getitem__)
        expect(
            at,
            f"choose_threshold gave {got:g}, which is not one of the thresholds: return neither its index "
            "nor its error",
        )
        expect(
            errors[at[0]] < errors[best] + 1e-6,
            f"choose_threshold gave {got:g}, where the mean cosine error is {errors[at[0]]:.4f}, but at "
            f"{thresholds[best]:g} it "
            f"is {errors[best]:.4f}",
        )
    print("choose_threshold is right: no other threshold has a smaller error.")


# --------------------------------------------------------------------------------------------------
# 13: the control
# --------------------------------------------------------------------------------------------------

READINGS = ("tokens", "tokens+query", "query")  # what the three refiners read
PREDICTED = ("least error", "most tokens right", "most exposure removed")


class Watched(vsr.Refiner):
    """A refiner that writes down what it was given, and the gradients that come back."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.calls, self.blind = [], False  # blind: it was called where no gradient is kept

    def forward(self, embeddings=None, states=None, query=None):
        refined = super().forward(embeddings, states, query)
        if not refined.requires_grad:
            self.blind = True
            return refined
        seen = {"embeddings": embeddings, "query": query.clone(), "refined": refined.detach()}
        seen["weights"] = nn.utils.parameters_to_vector(self.parameters()).detach()

        def note(slope):  # before any gradient of this step reaches a parameter
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            self.calls.append({**seen, "slope": slope, "left": any(bool(g.any()) for g in gradients)})

        refined.register_hook(note)
        return refined


def check_parallel_control(train) -> None:
    for reads in (("tokens", "query"), ("query",)):
        check_training(train, reads)
    print(
        "train is right: batches of all rollouts, the written tokens as input, the true ones as target, and "
        "only the refiner learns."
    )


def check_training(train, reads: tuple) -> None:
    """Train a tiny refiner on made-up rollouts, and look at each of its steps."""
    generator = torch.Generator().manual_seed(0)
    S, N, V, D, C, steps = 64, 6, 9, 5, 7, 40
    codebook = unit(V, D, generator=generator)
    target = torch.randint(V, (S, N), generator=generator)
    mistaken = torch.rand(S, N, generator=generator) < 0.4
    tokens = torch.where(mistaken, torch.randint(V, (S, N), generator=generator), target)
    query = codebook[target] @ torch.randn(D, C, generator=generator)  # tells the truth, with noise
    query += 0.1 * torch.randn(S, N, C, generator=generator)
    rollout = vsr.Rollout(tokens, None, query)
    frozen = {"codebook": codebook, "rollout.tokens": tokens, "rollout.query": query, "target": target}
    copies = {name: value.clone() for name, value in frozen.items()}
    torch.manual_seed(0)
    refiner = Watched(vsr.RefinerConfig(layers=1, heads=2, width=16), reads, (2, 3), D, C)

    def loss_now():
        with torch.no_grad():
            refined = vsr.Refiner.forward(refiner, copies["codebook"][copies["rollout.tokens"]], query=query)
        return vsr.cosine_loss(refined, copies["codebook"][copies["target"]]).item()

    start, weights = loss_now(), nn.utils.parameters_to_vector(refiner.parameters()).detach()
    where = f" for a refiner that reads {'+'.join(reads)}"
    unseen = "the refiner was called where no gradient is kept: call refiner(...) itself, not vsr.refine"
    try:
        losses = call("train", train, refiner, codebook, rollout, target, steps, where=where)
    except Wrong as wrong:
        if refiner.blind and not refiner.calls:
            raise Wrong(unseen) from wrong.__cause__
        raise
    calls = refiner.calls
    expect(calls or not refiner.blind, unseen)
    expect(calls, "no gradient went through the refiner that was given: train this one, with loss.backward()")
    for name, value in frozen.items():
        same = torch.equal(value, copies[name]) and not value.requires_grad
        expect(same, f"{name} has changed, or would learn: nothing but the refiner is trained")

    used = torch.zeros(S, dtype=torch.bool)
    for step, now in enumerate(calls):
        B = len(now["query"])
        expect(B == 32, f"step {step}: the batch has {B} rollouts, expected 32")
        distance = (now["query"][:, None] - query).abs().amax((2, 3))  # (B, S)
        nearest, rows = distance.min(1)
        expect(nearest.max() < 1e-5, f"step {step}: the query states are not those of rollout.query")
        used[rows] = True
        if "tokens" in reads:
            given = F.normalize(now["embeddings"].detach(), dim=-1)
            if not close(given, codebook[tokens[rows]]):
                others = (given[:, None] - codebook[tokens]).abs().amax((2, 3)).amin(1)
                mistakes = [
                    (f"step {step}: the refiner was given the true tokens. When a model is used nobody has "
                     "them: give it rollout.tokens", codebook[target[rows]]),
                ]  # fmt: skip
                line = f"step {step}: the embeddings are not codebook[rollout.tokens[rows]]"
                if others.max() < 1e-5:
                    line = f"step {step}: tokens and query are of different rollouts: take the same rows"
                diagnose(given, mistakes, line)

        def slope_of(truth, refined=now["refined"], sign=1):
            """The direction in which the loss against these tokens falls, without the part along e'."""
            leaf = refined.clone().requires_grad_()
            (slope,) = torch.autograd.grad(sign * vsr.cosine_loss(leaf, codebook[truth]), leaf)
            return across(slope, refined)

        def across(slope, refined=now["refined"]):
            slope = slope - (slope * refined).sum(-1, keepdim=True) * refined
            return slope / slope.norm().clamp_min(1e-12)

        slope = across(now["slope"])
        if not close(slope, slope_of(target[rows]), 1e-3):
            mistakes = [
                (f"step {step}: you compare with what was written: the target is codebook[target[rows]]",
                 slope_of(tokens[rows])),
                (f"step {step}: the loss would rise, not fall: its sign is wrong",
                 slope_of(target[rows], sign=-1)),
            ]  # fmt: skip
            line = f"step {step}: the gradient is not that of the cosine loss against codebook[target[rows]]"
            diagnose(slope, mistakes, line + " with the rows of this batch")
        expect(
            not now["left"],
            f"step {step}: the gradients of the step before are still there and would be added to: set "
            "them to zero in each step",
        )
        after = calls[step + 1]["weights"] if step + 1 < len(calls) else None
        after = nn.utils.parameters_to_vector(refiner.parameters()).detach() if after is None else after
        moved = not torch.equal(now["weights"], after)
        expect(moved, f"step {step}: the refiner did not change: the optimizer's step is missing")
    expect(len(calls) == steps, f"{len(calls)} steps were taken, expected {steps}")
    if not used.all():
        (row,) = first(~used)
        raise Wrong(
            f"{(~used).sum()} of {S} rollouts were never used, number {row} for one: draw other rows in each "
            "step, from all"
        )

    expect(losses is not None, "train gave None: is the `return` missing?")
    try:
        losses = [float(loss) for loss in losses]
    except (TypeError, ValueError):
        raise Wrong(f"train gave {type(losses).__name__}, expected a list of numbers, one a step") from None
    expect(len(losses) == steps, f"train gave {len(losses)} losses for {steps} steps")
    for step, (loss, now) in enumerate(zip(losses, calls, strict=True)):
        rows = (now["query"][:, None] - query).abs().amax((2, 3)).argmin(1)
        wanted = vsr.cosine_loss(now["refined"], codebook[target[rows]]).item()
        expect(
            close(loss, wanted),
            f"step {step}: you report the loss {loss:.4g}, but it was {wanted:.4g}, the mean over the batch",
        )
    end, largest = loss_now(), (nn.utils.parameters_to_vector(refiner.parameters()) - weights).abs().max()
    expect(
        end < 0.9 * start,
        f"{steps} steps took the loss over all rollouts from {start:.3f} to {end:.3f}{where}: is the "
        f"learning rate too small or too large? No weight has moved by more than {largest.item():.2g}",
    )


def check_prediction(predict) -> None:
    """The form of a prediction. What it says is between you and the result."""
    prediction = call("predict", predict)
    expect(isinstance(prediction, dict), f"predict gave {prediction!r}, expected a dictionary")
    missing, extra = set(PREDICTED) - set(prediction), set(prediction) - set(PREDICTED)
    expect(not missing, f"predict says nothing of {', '.join(map(repr, sorted(missing)))}")
    expect(not extra, f"predict has {', '.join(map(repr, extra))}, which was not asked")
    for name, answer in prediction.items():
        if answer not in ("backbone", *READINGS):
            raise Wrong(f"{name!r}: {answer!r} is none of 'backbone', {', '.join(map(repr, READINGS))}")
    print("Noted. Now run it.")


class Lesson(NamedTuple):
    """What the frozen backbone wrote, to train small refiners on and to measure them."""

    codebook: torch.Tensor  # (V, D) unit norm
    sizes: dict  # grid, code_dim and state_dim of a `vsr.Refiner`
    train: vsr.Rollout  # tokens y_q (S, N), query (S, N, C); no states
    train_target: torch.Tensor  # (S, N) long, y*
    val: vsr.Rollout
    val_target: torch.Tensor
    forced: vsr.Rollout  # what the backbone writes for the validation sentences after true tokens


@torch.no_grad()
def load_lesson(seed: int, task: str = "colorize", train: int = 1024, val: int = 128, path=None) -> Lesson:
    """Rollouts of the backbone in `path` (weights/toy.pt) for sentences of one task, others for each seed."""
    tokenizer, backbone, _, config = evaluate.load_run(path or WEIGHTS, torch.device("cpu"))
    sentences = data.Sentences(data.DataConfig(**config["data"]), seed)
    N, parts = tokenizer.tokens_per_image, []
    for split, total in (("train", train), ("val", val)):
        images, number = [], 0
        while sum(map(len, images)) < total:
            drawn, tasks = sentences(split, number, 64)
            images.append(drawn[tasks == data.TASKS.index(task)])
            number += 1
        prompts, targets, written, query = [], [], [], []
        for part in torch.cat(images)[:total].split(128):
            tokens = tokenizer.encode(part.flatten(0, 1)).view(*part.shape[:2], N)
            prompts.append(tokens[:, :-1].flatten(1))
            targets.append(tokens[:, -1])
            rollout = backbone.generate(prompts[-1], N)
            written.append(rollout.tokens)
            query.append(rollout.query)
        parts += [vsr.Rollout(torch.cat(written), None, torch.cat(query)), torch.cat(targets)]
    states = [backbone.replay(*pair).states for pair in zip(prompts, targets, strict=True)]
    forced = parts[2]._replace(tokens=backbone.logits(torch.cat(states)).argmax(-1))
    codebook = tokenizer.codebook.vectors
    sizes = {"grid": tokenizer.grid, "code_dim": codebook.shape[1], "state_dim": backbone.config.width}
    return Lesson(codebook, sizes, *parts, forced)


# --------------------------------------------------------------------------------------------------
# 14: the KV cache
# --------------------------------------------------------------------------------------------------


def check_kv_cache(decode_step) -> None:
    generator = torch.Generator().manual_seed(0)
    B, T, C, d = 3, 7, 6, 4
    x = torch.randn(B, T, C, generator=generator)
    W_q, W_k, W_v = [torch.randn(C, d, generator=generator) for _ in range(3)]
    q, k, v = x @ W_q, x @ W_k, x @ W_v  # (B, T, d) each

    def attend(t, start, stop, keys, values, scale=d**-0.5):
        scores = (q[:, t, None] * scale) @ keys[:, start:stop].transpose(1, 2)  # (B, 1, S)
        return (scores.softmax(-1) @ values[:, start:stop])[:, 0]  # (B, d)

    cache = (
        torch.randn(2, B, T, d, generator=generator) * 3
    )  # what an earlier use of the memory has left in it
    for t in range(T):
        before = cache.clone()
        given = [x[:, t].clone(), W_q.clone(), W_k.clone(), W_v.clone()]
        result = call("decode_step", decode_step, *given, cache, t, where=f" at t = {t}")
        y = as_tensor("decode_step", result, (B, d))
        for name, slot, wanted, other in (("keys", 0, k, v), ("values", 1, v, k)):
            row = cache[slot, :, t]
            if not close(row, wanted[:, t]):
                mistakes = [
                    (f"keys and values are swapped: cache[{slot}] is for the {name}", other[:, t]),
                    (
                        f"t = {t}: row {t} of cache[{slot}] was not written: the {name} of x belong there",
                        before[slot, :, t],
                    ),
                ]
                diagnose(
                    row,
                    mistakes,
                    f"t = {t}: row {t} of cache[{slot}] does not hold the {name} of x, x @ W_{name[0]}",
                )
            changed = ((cache[slot] != before[slot]).any(-1)).any(0)  # (T,)
            changed[t] = False
            if changed.any():
                (row,) = first(changed)
                raise Wrong(
                    f"t = {t}: row {row} of the {name} was changed too; a step writes row {t} and no other"
                )
        expect(
            not y.isnan().any(),
            f"t = {t}: the result is nan. Write row {t} first, then look: a position sees itself",
        )
        wanted = attend(t, 0, t + 1, k, v)
        if not close(y, wanted):
            mistakes = [
                (f"t = {t}: position {t} does not see itself; rows 0 to {t} count, that is t + 1 of them",
                 attend(t, 0, t, before[0], before[1]) if t else torch.zeros(B, d)),
                (f"t = {t}: rows after {t} were read, and they hold what an earlier use has left "
                 "there", attend(t, 0, T, *cache)),
                (f"t = {t}: row {t + 1} was read; it has not been written yet", attend(t, 0, t + 2, *cache)),
                (f"t = {t}: row {t} was read before it was written", attend(t, 0, t + 1, *before)),
                (f"t = {t}: the scores are not divided by sqrt(d)", attend(t, 0, t + 1, k, v, 1.0)),
                (f"t = {t}: the scores are divided by sqrt(C); d is the size of a "
                 "key", attend(t, 0, t + 1, k, v, C**-0.5)),
            ]  # fmt: skip
            b, i = first((y - wanted).abs() > 1e-4)
            got, full = y[b, i].item(), wanted[b, i].item()
            line = f"t = {t}: number {i} of sequence {b} is {got:.4f}, full attention gives {full:.4f}"
            diagnose(y, mistakes, line)
    t = 3
    results = []
    for seed in (1, 2):
        cache = torch.randn(2, B, T, d, generator=torch.Generator().manual_seed(seed)) * 30
        cache[0, :, :t], cache[1, :, :t] = k[:, :t], v[:, :t]
        results.append(
            call("decode_step", decode_step, x[:, t], W_q, W_k, W_v, cache, t, where=f" at t = {t}")
        )
    expect(close(*results), f"t = {t}: the result depends on the rows after {t}, which hold nothing yet")
    print(
        "decode_step is right: step by step it gives full causal attention, writes one row and reads none of "
        "the later ones."
    )


# --------------------------------------------------------------------------------------------------
# 15: the residual refiner
# --------------------------------------------------------------------------------------------------


def check_residual_refiner(TinyRefiner) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    grid, N, D = (2, 3), 6, 5
    refiner = call("TinyRefiner", TinyRefiner, grid, D, where=f" for grid {grid} and code_dim {D}")
    expect(
        isinstance(refiner, nn.Module), f"TinyRefiner gave a {type(refiner).__name__}, expected an nn.Module"
    )
    for name, value in vars(refiner).items():
        if isinstance(value, list | tuple) and any(isinstance(item, nn.Module) for item in value):
            raise Wrong(
                f"self.{name} is a plain Python list of layers, which no optimizer finds: use nn.ModuleList"
            )
    refiner.eval()

    def output(embeddings, what=refiner):
        where = f" for embeddings {tuple(embeddings.shape)}"
        return as_tensor(
            "forward", call("forward", what, embeddings, where=where, keep=True), tuple(embeddings.shape)
        )

    embeddings = torch.randn(8, N, D, generator=generator) * 4  # of any norm
    start = output(embeddings)
    expect(not start.isnan().any(), "forward gave nan")
    norms = start.norm(dim=-1)
    if (norms - 1).abs().max() > 1e-4:
        b, t = first((norms - 1).abs() > 1e-4)
        raise Wrong(
            f"the result at sentence {b}, position {t} has norm {norms[b, t].item():.3f}, expected 1: "
            "normalise at the end"
        )
    cosine = F.cosine_similarity(start, embeddings, dim=-1)
    if cosine.min() < 1 - 1e-4:
        b, t = first(cosine < 1 - 1e-4)
        raise Wrong(
            f"untrained it moves embeddings: at sentence {b}, position {t} the cosine to the input is "
            f"{cosine[b, t].item():.3f}, "
            "expected 1. Add the input, and start the last layer (weight and bias) at zero"
        )
    parameters = [p for p in refiner.parameters() if p.requires_grad]
    expect(parameters, "there is nothing to train: no parameter has requires_grad")
    target = unit(8, N, D, generator=generator)
    slopes = torch.autograd.grad(vsr.cosine_loss(output(embeddings), target), parameters, allow_unused=True)
    moved = any(slope is not None and slope.abs().max() > 0 for slope in slopes)
    expect(
        moved,
        "untrained, no parameter gets a gradient, so it stays untrained for ever: only the last layer starts "
        "at zero",
    )

    with torch.no_grad():  # as if it had been trained
        for parameter in parameters:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    before = output(embeddings)
    norms = before.norm(dim=-1)
    expect(
        (norms - 1).abs().max() < 1e-4,
        f"once trained the norms are {norms.min().item():.3f} to {norms.max().item():.3f}, expected 1: "
        "normalise the sum",
    )
    sees = torch.zeros(N, N, dtype=torch.bool)  # [t, s]: the result at t changes with the input at s
    for s in range(N):
        changed = embeddings.clone()
        changed[:, s] = torch.randn(8, D, generator=generator) * 4
        sees[:, s] = (output(changed) - before).abs().amax((0, 2)) > 1e-6
    blind = ~sees
    if blind.any():
        t, s = first(blind)
        if torch.equal(sees, torch.eye(N, dtype=torch.bool)):
            raise Wrong(
                f"position {t} does not see position {s}, nor any other: every position has to be told of "
                "all, by attention"
            )
        if torch.equal(sees, torch.ones(N, N, dtype=torch.bool).tril()):
            raise Wrong(
                f"position {t} does not see position {s}, which comes later: it is causal. vsr.Block needs "
                "`grid` to see all"
            )
        raise Wrong(f"position {t} does not see position {s}")
    louder = output(embeddings * 5)
    expect(
        close(louder, before),
        "longer embeddings give another result: normalise them first, only their direction counts",
    )
    order = torch.tensor([3, 0, 4, 1, 5, 2])
    expect(
        not close(output(embeddings[:, order]), before[:, order]),
        "it cannot tell positions apart: shuffled inputs give shuffled results. Embed the place, or give "
        "vsr.Block a grid",
    )

    torch.manual_seed(0)
    refiner = call("TinyRefiner", TinyRefiner, (2, 3), D).train()
    codebook = unit(7, D, generator=generator)
    tokens = torch.randint(7, (64, N), generator=generator)
    truth = tokens.roll(
        1, 1
    )  # what is true here is written at the place before: only reading others can find it
    optimizer = torch.optim.AdamW(refiner.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = vsr.cosine_loss(refiner(codebook[tokens]), codebook[truth])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    expect(
        losses[-1] < 0.8 * losses[0],
        f"60 steps of training lower the loss from {losses[0]:.3f} to {losses[-1]:.3f} only: do its parts "
        "reach the result?",
    )
    print(
        "TinyRefiner is right: the identity before training, unit norm, every position sees all others, and "
        "it learns."
    )


# --------------------------------------------------------------------------------------------------
# 16: the open one
# --------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Validation sentences, what the frozen backbone wrote for them, and the frozen models."""

    prompt: torch.Tensor  # (B, P) long: all images but the last
    rollout: vsr.Rollout  # tokens y_q (B, N), states (B, N, C), query (B, N, C)
    truth: torch.Tensor  # (B, N) long, y*: to look at and to score with, never to refine with
    task: torch.Tensor  # (B,) long, into data.TASKS
    codebook: torch.Tensor  # (V, D) unit norm
    backbone: vsr.GPT
    refiners: dict  # {reading: vsr.Refiner}: "tokens", "tokens+query", "query"


@torch.no_grad()
def load_case(part: str = "try", path=None) -> Case:
    """128 sentences with the models in `path` (weights/toy.pt).

    part: "try" for you and "check" for the check, of the validation split; "test" for the end. Raises Wrong
    if the file is not there.
    """
    path = Path(path or WEIGHTS)
    expect(
        path.exists(),
        f"{path.name} is not there: `python train_refiner.py --weights weights/{path.name}` makes it",
    )
    tokenizer, backbone, refiners, config = evaluate.load_run(path, torch.device("cpu"))
    sentences = data.Sentences(data.DataConfig(**config["data"]), config["run"]["seed"])
    split, *numbers = {"try": ("val", 0, 1), "check": ("val", 2, 3), "test": ("test", 0, 1)}[part]
    images, task = data.joined(sentences(split, number, 64) for number in numbers)
    tokens = tokenizer.encode(images.flatten(0, 1)).view(*images.shape[:2], -1)  # (B, 2K+2, N)
    prompt, truth = tokens[:, :-1].flatten(1), tokens[:, -1]
    rollout = backbone.generate(prompt, truth.shape[1])
    return Case(prompt, rollout, truth, task, tokenizer.codebook.vectors, backbone, refiners)


@torch.no_grad()
def plain_refinement(case: Case) -> torch.Tensor:
    """One pass of the refiner that reads what was written and the query: tokens (B, N)."""
    return vsr.refine(case.refiners["tokens+query"], case.codebook, *case.rollout)[0]


@torch.no_grad()
def report(case: Case, yours: torch.Tensor) -> str:
    """A table of mean cosine errors, over all sentences and by task, and of the tokens that are right."""
    forced = case.backbone.replay(case.prompt, case.truth).states
    written = {
        "backbone alone": case.rollout.tokens,
        "plain refinement": plain_refinement(case),
        "control (query)": vsr.refine(case.refiners["query"], case.codebook, *case.rollout)[0],
        "yours": yours,
        "teacher forced": case.backbone.logits(forced).argmax(-1),
    }
    mean, right = {}, {}
    head = "".join(f"{name:>10}" for name in ("all", *data.TASKS))
    lines = [f"{'cosine error':18}{head}{'tokens right':>14}{'gap closed':>12}"]
    for name, tokens in written.items():
        error = vsr.cosine_error(tokens, case.truth, case.codebook).mean(1)  # (B,)
        mean[name] = error.mean().item()
        by_task = [error[case.task == number].mean().item() for number in range(len(data.TASKS))]
        right[name] = (tokens == case.truth).float().mean().item()
        row = "".join(f"{value:10.4f}" for value in (mean[name], *by_task))
        lines.append(f"{name:18}{row}{right[name]:14.1%}")
    for number, name in ((2, "plain refinement"), (3, "control (query)"), (4, "yours")):
        lines[number] += f"{vsr.gap_closed(mean['backbone alone'], mean[name], mean['teacher forced']):12.2f}"
    lines.append("What the control has too, without a look at what was written, is no repair.")
    if mean["yours"] >= mean["plain refinement"]:
        lines.append("Yours is not better than plain refinement, which is a result too.")
    elif right["yours"] < right["plain refinement"]:
        lines.append("Yours has the smaller error but fewer right tokens: is that repair, or playing safe?")
    else:
        lines.append("Yours is better than plain refinement.")
    return "\n".join(lines)


def check_open(improve, case: Case | None = None) -> None:
    """Compare with plain refinement. A worse result does not fail; one that reads the truth does."""
    case = load_case("check") if case is None else case
    generator = torch.Generator().manual_seed(0)
    V, shape = len(case.codebook), tuple(case.truth.shape)
    scrambled = (case.truth + torch.randint(1, V, shape, generator=generator)) % V  # nowhere the truth

    def run(truth):
        torch.manual_seed(0)
        tokens = call("improve", improve, case._replace(truth=truth), where=f" for {shape[0]} sentences")
        tokens = as_tensor("improve", tokens, shape, torch.int64)
        outside = (tokens < 0) | (tokens >= V)
        if outside.any():
            at = first(outside)
            raise Wrong(
                f"sentence {at[0]}, position {at[1]}: token {tokens[at].item()} is not in the codebook, 0 to "
                f"{V - 1}"
            )
        return tokens.clone()

    kept = case.rollout.tokens.clone()
    yours, again, blind = run(case.truth), run(case.truth), run(scrambled)
    expect(
        torch.equal(case.rollout.tokens, kept), "improve changed case.rollout.tokens in place: work on a copy"
    )
    if not torch.equal(yours, again):
        b, t = first(yours != again)
        raise Wrong(
            f"two calls with the same case differ at sentence {b}, position {t}: make your generator inside "
            "the function"
        )
    if not torch.equal(yours, blind):
        b, t = first(yours != blind)
        raise Wrong(
            f"with another truth you give another answer (sentence {b}, position {t}): the truth must not be "
            "read, since nobody "
            "has it when a model is used"
        )
    print(report(case, yours))
