"""The tokenizer: quantization and its gradients, losses, revival, and reconstruction."""

import copy
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import runtime
import train_refiner
import vqgan
from vqgan import VQGAN, Codebook, Discriminator, VQGANConfig

CPU = torch.device("cpu")
TINY = {"factor": 4, "codebook_size": 32, "code_dim": 8, "channels": 32, "res_blocks": 1}


def unit(*shape) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


@pytest.fixture
def model():
    return VQGAN(VQGANConfig(**TINY), 32)


def test_gradient_goes_straight_through_the_quantization():
    codebook, z = Codebook(16, 4), unit(2, 5, 4).requires_grad_()
    quantized, tokens, _, _ = codebook(z)
    assert torch.allclose(quantized, codebook.vectors[tokens], atol=1e-6)
    quantized.retain_grad()
    (quantized * torch.randn_like(quantized)).square().sum().backward()
    assert torch.equal(z.grad, quantized.grad)
    assert z.grad.abs().sum() > 0
    assert codebook.weight.grad is None or not codebook.weight.grad.any()


def test_commitment_moves_the_encoder_only_and_codebook_loss_the_codes_only():
    codebook, z = Codebook(16, 4), unit(2, 5, 4).requires_grad_()
    _, _, codebook_loss, commitment_loss = codebook(z)
    for loss, moved in ((codebook_loss, codebook.weight), (commitment_loss, z)):
        gradients = torch.autograd.grad(loss, [codebook.weight, z], retain_graph=True, allow_unused=True)
        for parameter, gradient in zip([codebook.weight, z], gradients, strict=True):
            assert (gradient is not None and bool(gradient.any())) == (parameter is moved)
    assert torch.allclose(codebook_loss, commitment_loss)
    assert torch.allclose(commitment_loss, (2 - 2 * (z @ codebook.vectors.T).amax(-1)).mean(), atol=1e-5)


def test_beta_weighs_the_encoders_term_in_training():
    """After one step with another beta, the encoder is another; codes and decoder are the same."""
    sentences = data.Sentences(data.DataConfig(image_size=16))
    made = [VQGANConfig(**TINY, beta=beta, steps=1, batch_size=4) for beta in (0.0, 100.0)]
    trained = [train_refiner.train_tokenizer(c, sentences, CPU, torch.float32)[0].state_dict() for c in made]
    same = {name: torch.equal(weight, trained[1][name]) for name, weight in trained[0].items()}
    assert same["codebook.weight"]
    assert all(equal for name, equal in same.items() if name.startswith("decoder"))
    assert not all(equal for name, equal in same.items() if name.startswith("encoder"))


def test_a_code_is_its_own_nearest_neighbour():
    codebook = Codebook(64, 8)
    assert codebook(codebook.vectors)[1].tolist() == list(range(64))
    assert torch.allclose(codebook.vectors.norm(dim=-1), torch.ones(64))


def test_near_codes_are_told_apart_under_bfloat16_autocast():
    codebook = Codebook(64, 8)
    codebook.weight.data = unit(1, 8) + 0.02 * torch.randn(64, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert codebook(codebook.vectors)[1].tolist() == list(range(64))


def test_tokens_are_the_nearest_codes_by_distance(model):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    distance = torch.cdist(model.latents(images), model.codebook.vectors.expand(2, -1, -1))
    tokens = model.encode(images)
    assert torch.equal(tokens, distance.argmin(-1))
    assert torch.equal(tokens, model(images)[1])
    assert tokens.unique().numel() > 1


@pytest.mark.parametrize(("factor", "size"), [(2, 16), (4, 32), (8, 64), (16, 64)])
def test_shapes(factor, size):
    model = VQGAN(VQGANConfig(**{**TINY, "factor": factor}), size)
    side = size // factor
    tokens = model.encode(torch.zeros(2, 3, size, size))
    assert model.grid == (side, side)
    assert tokens.shape == (2, model.tokens_per_image) == (2, side * side)
    assert model.embed(tokens).shape == (2, side * side, 8)
    assert model.decode(tokens).shape == (2, 3, size, size)


def test_decoding_tokens_is_decoding_their_embeddings(model):
    tokens = torch.randint(32, (2, 64))
    with torch.no_grad():
        model.decoder[-1].weight *= 30
        from_embeddings = model.decode_embeddings(model.embed(tokens))
        assert from_embeddings.abs().max() > 1
        assert torch.equal(model.decode(tokens), from_embeddings.clamp(-1, 1))
    assert torch.allclose(model.embed(tokens).norm(dim=-1), torch.ones(2, 64))


def test_tokens_are_in_raster_order_and_local(model):
    """A changed pixel reaches the latents of the patches around it, and no other."""
    for parameter in model.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.rand(1, 3, 32, 32)
    changed = images.clone()
    changed[:, :, 1, 30] += 0.5  # first row of patches, last column
    moved = (model.latents(images) - model.latents(changed)).abs().amax(-1).view(8, 8) > 1e-6
    assert moved[0, 7]
    assert not moved[2:].any()
    assert not moved[:, :6].any()


def test_revival_puts_dead_codes_on_latents_and_leaves_the_others():
    codebook, latents = Codebook(8, 4), unit(20, 4)
    before = codebook.weight.detach().clone()
    for _ in range(3):
        codebook.count_use(torch.tensor([[0, 3], [3, 5]]))
    assert codebook.revive(latents, 4, torch.Generator().manual_seed(0)) == 0
    assert torch.equal(codebook.weight, before)
    assert codebook.revive(latents, 3, torch.Generator().manual_seed(0)) == 5
    for code in range(8):
        if code in (0, 3, 5):
            assert torch.equal(codebook.weight[code], before[code])
        else:
            assert (codebook.weight[code] == latents).all(1).any()
    assert codebook.revive(latents, 3, torch.Generator().manual_seed(0)) == 0


def test_generator_loss_leaves_the_discriminator_alone():
    discriminator, fake = Discriminator(8), torch.randn(2, 3, 16, 16, requires_grad=True)
    loss = vqgan.generator_loss(discriminator, fake)
    assert torch.allclose(loss, -discriminator(fake).mean())
    loss.backward()
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in discriminator.parameters())


def test_discriminator_loss_leaves_the_generator_alone():
    discriminator, fake = Discriminator(8), torch.randn(2, 3, 16, 16, requires_grad=True)
    vqgan.discriminator_loss(discriminator, torch.randn(2, 3, 16, 16), fake).backward()
    assert fake.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())


@pytest.mark.parametrize(
    ("real", "fake", "expected"), [(0, 0, 1), (1, -1, 0), (2, -3, 0), (-1, 1, 2), (0.5, 0, 0.75)]
)
def test_hinge_loss_of_constant_logits(real, fake, expected):
    logits = torch.tensor([[real], [fake]], dtype=torch.float32)
    loss = vqgan.discriminator_loss(lambda images: images, logits[0], logits[1])
    assert loss.item() == pytest.approx(expected)


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    layer = torch.randn(4, 3, requires_grad=True)
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    weight = vqgan.adaptive_weight((layer * a).sum(), (layer * b).sum(), layer)
    assert weight.item() == pytest.approx((a.norm() / b.norm()).item(), rel=1e-3)
    assert not weight.requires_grad
    assert layer.grad is None
    assert vqgan.adaptive_weight((layer * a).sum() * 1e9, (layer * 0).sum(), layer) == 1e4


def test_psnr():
    truth = torch.zeros(3, 3, 8, 8)
    images = truth + torch.tensor([0.2, 2.0, 0.0])[:, None, None, None]
    assert vqgan.psnr(images, truth).tolist() == pytest.approx([20, 0, 60], abs=1e-4)


def test_ssim():
    truth = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert vqgan.ssim(truth, truth).tolist() == pytest.approx([1, 1], abs=1e-5)
    little, much = truth + 0.1 * torch.randn_like(truth), truth + torch.randn_like(truth)
    assert (vqgan.ssim(little, truth) > vqgan.ssim(much, truth)).all()
    assert torch.allclose(vqgan.ssim(little, truth), vqgan.ssim(truth, little), atol=1e-6), "symmetric"
    # Two flat images: no structure to compare, so the luminance term alone
    a, b = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), -0.25)
    expected = (2 * 0.75 * 0.375 + 0.0001) / (0.75**2 + 0.375**2 + 0.0001)  # on [0, 1], as it is published
    assert vqgan.ssim(a, b).item() == pytest.approx(expected, abs=2e-4)
    alone = vqgan.ssim(truth[:1], truth[1:])[0].item()
    assert vqgan.ssim(truth, truth.flip(0))[0] == pytest.approx(alone, abs=1e-6)


def test_gradient_loss_ignores_brightness_and_sees_edges():
    images = torch.rand(2, 3, 8, 8)
    assert vqgan.gradient_loss(images + 0.3, images) < 1e-10
    step = torch.zeros(1, 1, 8, 8)
    step[..., 4:] = 2
    assert vqgan.gradient_loss(step, torch.zeros_like(step)).item() == pytest.approx(4 / 7)


def test_learning_rate_warms_up_and_decays():
    rates = [train_refiner.scheduled_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] < 0.1
    assert max(rates) == pytest.approx(2.0, rel=0.03)
    assert rates[-1] == pytest.approx(0.04)
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_overfits_one_batch():
    model = VQGAN(VQGANConfig(**TINY), 16)
    images, _ = data.Sentences(data.DataConfig(image_size=16))("train", 0, 2)
    images = images.flatten(0, 1)[:4]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(150):
        rebuilt, tokens, z, codebook_loss, commitment_loss = model(images)
        error = F.mse_loss(rebuilt, images)
        optimizer.zero_grad()
        (error + 0.1 * (codebook_loss + 0.25 * commitment_loss)).backward()
        optimizer.step()
        model.codebook.count_use(tokens)
        if step % 20 == 19 and step < 110:
            model.codebook.revive(z.detach().flatten(0, 1), 20, torch.Generator().manual_seed(step))
    assert F.mse_loss(model.decode(model.encode(images)), images) < 0.02


@pytest.mark.parametrize("gan_weight", [0.0, 0.5])
def test_training_lowers_the_error_with_and_without_the_adversarial_loss(gan_weight):
    sentences = data.Sentences(data.DataConfig(image_size=16))
    config = VQGANConfig(**TINY, steps=50, batch_size=16, gan_weight=gan_weight, gan_start=0.5)
    model, log = train_refiner.train_tokenizer(config, sentences, CPU, torch.float32)
    assert log["reconstruction"][-1] < 0.5 * log["reconstruction"][0]
    assert (log["discriminator"][-1] > 0) == (gan_weight > 0)
    assert log["discriminator"][0] == 0
    assert not any(p.requires_grad for p in model.parameters())


def test_a_saved_tokenizer_is_rebuilt_with_the_same_tokens(model, tmp_path):
    config = {"vqgan": asdict(model.config), "data": {"image_size": 32}}
    runtime.save(tmp_path / "tokenizer.pt", {"config": config, "model": model.state_dict()})
    checkpoint = runtime.load_checkpoint(tmp_path / "tokenizer.pt")
    rebuilt = evaluate.load_model("tokenizer", checkpoint, CPU, tmp_path / "tokenizer.pt")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(rebuilt.encode(images), model.encode(images))
    assert torch.equal(rebuilt.codebook.weight, model.codebook.weight)
    assert not rebuilt.training
    assert not any(p.requires_grad for p in rebuilt.parameters())


@pytest.mark.parametrize(("factor", "size"), [(3, 24), (16, 24), (12, 24)])
def test_a_factor_that_does_not_fit_is_an_error(factor, size):
    with pytest.raises(ValueError, match=f"factor {factor}: "):
        VQGAN(VQGANConfig(**{**TINY, "factor": factor}), size)


def test_score_tokenizer():
    """A tokenizer that loses nothing and uses eight codes equally often: all that is measured is known."""
    sentences = data.Sentences(data.DataConfig(image_size=16, eval_sentences=70))

    class Ideal(torch.nn.Module):
        config = VQGANConfig(codebook_size=32)
        codebook = vqgan.Codebook(32, 8)

        def encode(self, images):
            self.images = images
            return torch.arange(len(images) * 4).view(-1, 4) % 8

        def decode(self, tokens):
            return self.images

    scores = vqgan.score_tokenizer(Ideal(), sentences, "val", runtime.autocast(CPU, torch.float32))
    for name in ("psnr_source", "psnr_target", "psnr_edges"):
        assert scores[name] == pytest.approx(60)
    assert scores["codes_used"] == 8
    assert scores["perplexity"] == pytest.approx(8, rel=1e-4)
    assert scores["edge_sharpness"] == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tokenizers_work_in_any_floating_type(model, dtype):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    tokens, small = model.encode(images), copy.deepcopy(model).to(dtype)
    assert (small.encode(images) == tokens).float().mean() > 0.8
    assert torch.equal(small.encode(images.to(dtype)), small.encode(images))
    assert torch.allclose(small.decode(tokens), model.decode(tokens), atol=0.1)
    rebuilt, *_ = small(images)
    assert rebuilt.dtype == torch.float32


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_images_and_weights_that_are_not_finite_are_no_tokens(model, number):
    images = torch.zeros(2, 3, 32, 32)
    images[0, 0, 3, 3] = number
    with pytest.raises(ValueError, match="not finite"):
        model.encode(images)


def test_a_tokenizer_decodes_tokens_of_any_integer_type_and_nothing_else(model):
    tokens = torch.randint(model.config.codebook_size, (2, model.tokens_per_image))
    assert torch.equal(model.decode(tokens.to(torch.uint8)), model.decode(tokens))
    for wrong in (-1, model.config.codebook_size):
        with pytest.raises(IndexError):
            model.decode(torch.full_like(tokens, wrong))


def test_a_tokenizer_made_without_memory_computes_the_same_when_it_is_filled(model):
    with torch.device("meta"):
        filled = VQGAN(model.config, 32).eval()
    filled.load_state_dict(model.state_dict(), assign=True)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(filled.encode(images), model.encode(images))
    assert torch.equal(filled.decode(model.encode(images)), model.decode(model.encode(images)))
