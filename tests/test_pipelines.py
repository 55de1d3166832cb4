"""diffusers pipelines as setups: samples equal those of the pipelines' own schedulers.

The networks are tiny and random, and in float64, so that a few steps agree to many digits.
"""

import sys

import diffusers
import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

import s4s_core as s4s
from s4s_core import RectifiedFlow, Solver, VPDiscrete, VPTable, dpm_solver_pp, unipc

NFE = 5
LINEAR = {"beta_schedule": "linear"}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def seeded(make, *args, **options):
    """A network in float64 with random weights of its own, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make(*args, **options).double().eval()  # as from_pretrained gives it
        for p in net.parameters():  # AdaLN-Zero and output layers start at 0, where all agrees
            if not p.any():
                torch.nn.init.normal_(p, std=0.05)
    return net


def unet(**options):
    return seeded(
        diffusers.UNet2DModel,
        **{"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1}
        | {"block_out_channels": (8, 8), "norm_num_groups": 4, "add_attention": False}
        | {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        | options,
    )


def vae(kind=diffusers.AutoencoderKL, **options):
    return seeded(
        kind,
        **{"latent_channels": 4, "block_out_channels": (8, 8), "norm_num_groups": 4}
        | {"down_block_types": ("DownEncoderBlock2D",) * 2}
        | {"up_block_types": ("UpDecoderBlock2D",) * 2}
        | options,
    )


def scheduler(**options):
    """DDIM at levels 999, 799, .., 199, and from there to level 0."""
    return diffusers.DDIMScheduler(
        **{"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing"}
        | LINEAR
        | options
    )


@pytest.fixture(scope="module")
def text():
    """A byte-level CLIP tokenizer and the configuration of a tiny text encoder."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=8,
        bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
    )  # fmt: skip
    return tokenizer, config


def stable_diffusion(text, **options):
    tokenizer, config = text
    network = seeded(
        diffusers.UNet2DConditionModel, sample_size=4, block_out_channels=(8, 8),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return quiet(diffusers.StableDiffusionPipeline(
        vae(), seeded(transformers.CLIPTextModel, config), tokenizer, network,
        scheduler(**SD, **options), None, None, requires_safety_checker=False,
    ))  # fmt: skip


def stable_diffusion_3(text, **options):
    tokenizer, config = text
    network = seeded(
        diffusers.SD3Transformer2DModel, sample_size=4, patch_size=2, in_channels=4,
        out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=4,
    )  # fmt: skip
    encoders = [seeded(transformers.CLIPTextModelWithProjection, config) for _ in range(2)]
    return quiet(diffusers.StableDiffusion3Pipeline(
        network, diffusers.FlowMatchEulerDiscreteScheduler(**options), vae(shift_factor=0.1),
        encoders[0], tokenizer, encoders[1], tokenizer, None, None,
    ))  # fmt: skip


def stable_diffusion_xl(text, **options):
    tokenizer, config = text
    network = seeded(
        diffusers.UNet2DConditionModel, sample_size=4, block_out_channels=(8, 8),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=56,
    )  # fmt: skip
    return quiet(diffusers.StableDiffusionXLPipeline(
        vae(), seeded(transformers.CLIPTextModel, config),
        seeded(transformers.CLIPTextModelWithProjection, config), tokenizer, tokenizer, network,
        diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        ),
    ))  # fmt: skip


def t5():
    return seeded(transformers.T5EncoderModel, transformers.T5Config(
        vocab_size=514, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    ))  # fmt: skip


def flux(text, guidance_embeds=True):
    tokenizer, config = text
    network = seeded(
        diffusers.FluxTransformer2DModel, patch_size=1, in_channels=16, num_layers=1,
        num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        pooled_projection_dim=8, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    oracle = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return quiet(diffusers.FluxPipeline(
        oracle, vae(shift_factor=0.1), seeded(transformers.CLIPTextModel, config), tokenizer, t5(),
        tokenizer, network,
    ))  # fmt: skip


def wan(text):
    tokenizer, _ = text
    network = seeded(
        diffusers.WanTransformer3DModel, num_attention_heads=2, attention_head_dim=12,
        in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=16, num_layers=1,
        rope_max_seq_len=32,
    )  # fmt: skip
    encoder = seeded(transformers.UMT5EncoderModel, transformers.UMT5Config(
        vocab_size=514, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    ))  # fmt: skip
    autoencoder = seeded(
        diffusers.AutoencoderKLWan, base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.5, 1.0],
    )  # fmt: skip
    oracle = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return quiet(diffusers.WanPipeline(tokenizer, encoder, autoencoder, oracle, network))


def dit():
    network = seeded(
        diffusers.DiTTransformer2DModel, sample_size=4, patch_size=2, in_channels=4,
        out_channels=8, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    return quiet(diffusers.DiTPipeline(network, vae(), scheduler()))


def ldm():
    network = unet(sample_size=4, in_channels=3, out_channels=3)
    autoencoder = vae(diffusers.VQModel, latent_channels=3, num_vq_embeddings=16)
    return quiet(diffusers.LDMPipeline(autoencoder, network, scheduler(**SD)))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def setup_of(pipeline, **options):
    return s4s.from_diffusers(pipeline, check=False, **options)


def trailing(schedule):
    """Levels 999, 799, .., 199 of "trailing" spacing, then level 0."""
    t = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.001], dtype=torch.float64)
    return s4s.TimeGrid(schedule, t)


def ddim(setup, x_T):
    grid = trailing(setup.schedule)
    return Solver(s4s.ddim(grid), grid).sample(setup.denoiser, x_T)


def loop(scheduler, network, x, **condition):
    """The sampling loop that every pipeline has."""
    scheduler.set_timesteps(NFE)
    with torch.no_grad():
        for t in scheduler.timesteps:
            answer = network(x, t, **condition).sample
            x = scheduler.step(answer, t, x).prev_sample
    return x


def images(x):
    """As pipelines return them: 0 to 1, channels last."""
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def same(x, expected):
    # diffusers keeps alphas_cumprod in float32, a product of a thousand factors.
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
    assert x.std() > 0.05


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("betas", [LINEAR, SD, {"beta_schedule": "linear", "beta_end": 0.01}])
def test_ddim_on_a_pixel_model_equals_its_own_loop(noise, prediction_type, betas):
    network = unet()
    oracle = scheduler(prediction_type=prediction_type, **betas)
    setup = setup_of((network, oracle))
    x_T = noise(0, 3, 1, 8, 8)
    same(ddim(setup, x_T), loop(oracle, network, x_T))
    assert setup.shape == (1, 8, 8) and torch.equal(setup.decode(x_T), x_T)
    assert type(setup.schedule) is (VPDiscrete if betas is SD else VPTable)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.filterwarnings("ignore:The `sigmas`")
def test_higher_orders_equal_those_of_diffusers(noise, prediction_type, order):
    network, x_T = unet(), noise(1, 2, 1, 8, 8)
    common = {"prediction_type": prediction_type, "timestep_spacing": "trailing"}
    common |= {"final_sigmas_type": "sigma_min", "solver_order": order, **LINEAR}
    for kind, table, options in [
        (diffusers.DPMSolverMultistepScheduler, dpm_solver_pp, {}),
        (diffusers.UniPCMultistepScheduler, unipc, {"solver_type": "bh2"}),
    ]:
        oracle = kind(**common, **options)
        setup = setup_of((network, oracle))
        grid = trailing(setup.schedule)
        x_0 = Solver(table(grid, order), grid).sample(setup.denoiser, x_T)
        same(x_0, loop(oracle, network, x_T))


def test_unconditional_pipelines_give_the_same_images():
    network, oracle = unet(), scheduler()
    pipeline = quiet(diffusers.DDIMPipeline(network, oracle))
    setup = setup_of(pipeline)
    assert setup.name == "DDIMPipeline"
    generator = torch.Generator().manual_seed(3)
    x_T = torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    generator.manual_seed(3)
    expected = pipeline(
        2, generator, num_inference_steps=NFE, use_clipped_model_output=False, output_type="np"
    ).images
    same(images(ddim(setup, x_T)), torch.tensor(expected).double())


def test_latent_pipelines_give_the_same_images():
    pipeline = ldm()
    setup = setup_of(pipeline)
    generator = torch.Generator().manual_seed(3)
    x_T = torch.randn(2, 3, 4, 4, generator=generator)
    generator.manual_seed(3)
    with torch.no_grad():
        pipeline.unet.float(), pipeline.vqvae.float()
        expected = pipeline(2, generator, num_inference_steps=NFE, output_type="np").images
        x = setup.decode(ddim(setup, x_T.double()))
    same(images(x), torch.tensor(expected).double())


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_class_guidance_equals_that_of_the_dit_pipeline(guidance):
    pipeline = dit()
    setup = setup_of(pipeline, class_label=207, guidance=guidance)
    generator = torch.Generator().manual_seed(3)
    x_T = torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64)
    generator.manual_seed(3)
    expected = pipeline(
        [207, 207], guidance, generator, num_inference_steps=NFE, output_type="np"
    ).images
    same(images(setup.decode(ddim(setup, x_T))), torch.tensor(expected).double())
    assert not torch.allclose(ddim(setup_of(pipeline), x_T), ddim(setup, x_T))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_text_guidance_equals_that_of_stable_diffusion(text, noise, prediction_type, guidance):
    pipeline = stable_diffusion(text, prediction_type=prediction_type)
    setup = setup_of(pipeline, prompt="a digit", guidance=guidance)
    assert setup.schedule == VPDiscrete() and setup.shape == (4, 4, 4)
    x_T = noise(0, 2, 4, 4, 4)
    options = {"num_inference_steps": NFE, "guidance_scale": guidance, "latents": x_T}
    latents = pipeline(["a digit"] * 2, output_type="latent", **options).images
    x_0 = ddim(setup, x_T)
    same(x_0, latents)
    expected = pipeline(["a digit"] * 2, output_type="np", **options).images
    same(images(setup.decode(x_0)), torch.tensor(expected).double())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_flow_matching_equals_stable_diffusion_3(text, noise, shift, guidance):
    pipeline = stable_diffusion_3(text, shift=shift)
    setup = setup_of(pipeline, prompt="a digit", guidance=guidance)
    assert setup.schedule == RectifiedFlow(shift=shift)
    x_T, grid = noise(0, 2, 4, 4, 4), s4s.time_uniform(setup.schedule, NFE)
    points = list(Solver(s4s.ddim(grid), grid).trajectory(setup.denoiser, x_T))
    options = {"num_inference_steps": NFE, "guidance_scale": guidance, "latents": x_T}
    seen = []
    pipeline(
        ["a digit"] * 2, sigmas=grid.t[:-1].tolist(), output_type="latent", **options,
        callback_on_step_end=lambda pipe, i, t, names: seen.append(names["latents"]) or {},
    )  # fmt: skip
    # The pipeline's last step goes on to sigma = 0.
    same(torch.stack(points[1:-1]), torch.stack(seen[:-1]))
    D = setup.denoiser(points[-2], grid.t[-2])
    torch.testing.assert_close(D, seen[-1], rtol=1e-4, atol=1e-4)
    decoded = pipeline.vae.decode(D / pipeline.vae.config.scaling_factor + 0.1).sample
    torch.testing.assert_close(setup.decode(D), decoded)


def test_flow_matching_on_a_bare_unet_equals_its_scheduler(noise):
    network, oracle = unet(), diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    setup, x = setup_of((network, oracle)), noise(0, 2, 1, 8, 8)
    grid = s4s.time_uniform(setup.schedule, NFE)
    points = list(Solver(s4s.ddim(grid), grid).trajectory(setup.denoiser, x))
    oracle.set_timesteps(sigmas=grid.t[:-1].tolist())
    for t, expected in zip(oracle.timesteps[:-1], points[1:-1], strict=True):
        x = oracle.step(network(x, t).sample, t, x).prev_sample
        same(expected, x)


def test_a_flow_prediction_of_other_schedulers_is_known(noise):
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    one, other = (
        setup_of((unet(), oracle))
        for oracle in (
            diffusers.UniPCMultistepScheduler(**options),
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    )
    assert one.schedule == other.schedule
    x, t = noise(0, 2, 1, 8, 8), torch.tensor(0.3, dtype=torch.float64)
    assert torch.equal(one.denoiser(x, t), other.denoiser(x, t))


def test_cosine_levels_start_where_there_is_signal_left():
    setup = setup_of((unet(), scheduler(beta_schedule="squaredcos_cap_v2")))
    assert setup.schedule.lam(setup.schedule.T).item() == pytest.approx(-5.1)
    assert 0.9 < setup.schedule.T < 1
    assert Solver.from_dict(setup.teacher.to_dict()).grid.schedule == setup.schedule


def test_the_network_is_frozen_and_keeps_its_dtype(noise):
    network = unet(dropout=0.5).float().train()
    setup = setup_of((network, scheduler()))
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    x, t = noise(0, 3, 1, 8, 8).requires_grad_(), torch.tensor(0.4, dtype=torch.float64)
    t.requires_grad_()
    D = setup.denoiser(x, t)
    assert D.dtype == torch.float64 and network.dtype == torch.float32
    assert torch.equal(D, setup.denoiser(x, t))
    apart = torch.cat([setup.denoiser(row, t) for row in x.split(1)])
    torch.testing.assert_close(apart, D, rtol=1e-4, atol=1e-4)
    D.square().sum().backward()
    assert x.grad.abs().sum() > 0 and t.grad.abs() > 0
    assert setup.params.rematerialize and setup.device == "cpu"


def test_latents_are_decoded_differentiably(noise):
    for pipeline, channels in ((ldm(), 3), (dit(), 4)):
        setup = setup_of(pipeline)
        z = noise(0, 2, channels, 4, 4).requires_grad_()
        x = setup.decode(z)
        assert x.shape == (2, 3, 8, 8) and x.dtype == torch.float64
        x.sum().backward()
        assert z.grad.abs().sum() > 0


def test_a_learned_variance_is_left_out(noise):
    network = unet(out_channels=2)
    x, t = noise(0, 2, 1, 8, 8), torch.tensor(0.5, dtype=torch.float64)
    setup = setup_of((network, scheduler(prediction_type="sample")))
    assert torch.equal(setup.denoiser(x, t), network(x, torch.tensor(499.0)).sample[:, :1])


def test_a_network_that_looks_its_time_up_gets_the_nearest_level(noise):
    network = unet(time_embedding_type="learned", num_train_timesteps=1000)
    x, setup = noise(0, 2, 1, 8, 8), setup_of((network, scheduler(prediction_type="sample")))
    near, level = (torch.tensor(t, dtype=torch.float64) for t in (0.4998, 0.5))
    assert torch.equal(setup.denoiser(x, near), setup.denoiser(x, level))


def test_class_labels_of_a_pixel_unet_reach_it(noise):
    network = unet(num_class_embeds=3)
    x, t = noise(0, 2, 1, 8, 8), torch.tensor(0.5, dtype=torch.float64)
    a, b = (setup_of((network, scheduler()), class_label=n).denoiser(x, t) for n in (0, 2))
    assert not torch.allclose(a, b)


def test_three_lines_learn_and_sample():
    setup = setup_of((unet(), scheduler()), n_train=4, n_valid=2, batch_size=2, epochs=1)
    grid = s4s.time_logsnr(setup.schedule, 3)
    solver = Solver(s4s.ipndm(grid), grid)
    teacher = s4s.make_teacher_set(setup)
    *_, epoch = s4s.learn_coefficients(solver, setup, teacher)
    assert epoch.best.sample(setup.denoiser, teacher.x_T).isfinite().all()


def test_an_untrained_network_fails_the_self_test_in_one_sentence(one_sentence):
    with one_sentence("does not denoise", "check=False"):
        s4s.from_diffusers((unet(), scheduler()))


class TrainedDigits(diffusers.UNet2DModel):
    """The shipped digits network behind the signature of a UNet2DModel that predicts eps."""

    def __init__(self):
        super().__init__(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
            block_out_channels=(8,), norm_num_groups=4, add_attention=False,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )  # fmt: skip
        self.digits = s4s.load("digits", "cpu").denoiser
        self.levels = s4s.VPDiscrete()

    def forward(self, sample, timestep):
        t = (timestep[0].double() + 1) / 1000
        y, s = sample.double() / self.levels.alpha(t), self.levels.s(t)
        eps = (y - self.digits(y, s)) / s
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=eps.to(sample.dtype))


@pytest.mark.slow
def test_a_trained_network_passes_and_its_wrong_configuration_does_not(one_sentence):
    network = TrainedDigits()
    setup = s4s.from_diffusers((network, scheduler(**SD)))
    assert setup.schedule == VPDiscrete()
    for wrong, word in [
        ({"prediction_type": "v_prediction"}, "predicts"),
        ({"prediction_type": "sample"}, "predicts"),
        ({"beta_start": 0.0015, "beta_end": 0.0195}, "schedule"),
    ]:
        with one_sentence(word, "check=False"):
            s4s.from_diffusers((network, scheduler(**SD | wrong)))


@pytest.mark.parametrize(
    "option",
    [{"time_cond_proj_dim": 8}, {"class_embed_type": "timestep"}, {"addition_embed_type": "image"}],
)
def test_inputs_that_are_not_supplied_are_refused_by_name(text, one_sentence, option):
    pipe = stable_diffusion(text)
    pipe.unet.register_to_config(**option)
    with one_sentence("UNet2DConditionModel", *option, "from_noise_prediction"):
        s4s.from_diffusers(pipe, prompt="a cat", check=False)


def with_option(pipeline, **option):
    pipeline.register_to_config(**option)
    return pipeline


def refiner(pipeline):
    kind = diffusers.StableDiffusionXLImg2ImgPipeline
    return kind(**pipeline.components, requires_aesthetics_score=True)


def with_second(pipeline):
    pipeline.register_modules(transformer_2=pipeline.transformer)
    return pipeline


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda t: refiner(stable_diffusion_xl(t)), {},
         ["the pipeline's requires_aesthetics_score"]),
        (lambda t: with_option(wan(t), expand_timesteps=True), {}, ["expand_timesteps"]),
        (lambda t: with_second(wan(t)), {}, ["the pipeline's transformer_2"]),
        (wan, {}, ["WanTransformer3DModel", "shape=[4, 1, 32, 32]"]),
        (wan, {"shape": [4, 4, 4]}, ["4 channels, frames, a height and a width", "[4, 4, 4]"]),
        (flux, {"shape": [16, 4, 4]}, ["4 channels", "[16, 4, 4]"]),
        (flux, {"shape": [4, 4, 5]}, ["FluxTransformer2DModel", "even", "[4, 4, 5]"]),
        (lambda t: (flux(t).transformer, flux(t).scheduler), {"shape": [4, 4, 4]},
         ["FluxTransformer2DModel", "whole pipeline"]),
    ],
)  # fmt: skip
def test_what_is_not_supplied_to_larger_pipelines_is_named(
    text, one_sentence, make, options, words
):
    with one_sentence(*words):
        setup_of(make(text), **options)


def test_a_controlnet_is_refused_by_name(text, one_sentence):
    parts = stable_diffusion(text).components
    network = diffusers.ControlNetModel.from_unet(parts["unet"])
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=network, requires_safety_checker=False
    )
    with one_sentence("the pipeline's controlnet"):
        s4s.from_diffusers(pipe, prompt="a cat", check=False)


def exact_velocity(levels):
    """The v that is exact for data N(0.6, 0.5^2) on these alphas_cumprod, as a network."""

    class Exact(diffusers.UNet2DModel):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            t, log_alpha = timestep[0].double(), levels.double().clamp_min(1e-12).log() / 2
            below = t.floor().long().clamp(0, len(levels) - 2)
            log_alpha = torch.lerp(log_alpha[below], log_alpha[below + 1], t - below)
            alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
            gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
            x_0 = 0.6 + gain * (sample - alpha * 0.6)
            v = (alpha * sample - x_0) / sigma  # alpha eps - sigma x_0
            return diffusers.models.unets.unet_2d.UNet2DOutput(sample=v)

    network = unet()
    network.__class__ = Exact
    return network


def test_levels_without_signal_are_left_out_and_samples_are_right():
    own = scheduler(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    setup = s4s.from_diffusers((exact_velocity(own.alphas_cumprod), own))
    grid = s4s.time_logsnr(setup.schedule, 40)
    x = Solver(unipc(grid), grid).sample(setup.denoiser, s4s.initial_noise(setup, range(400)))
    # Each pixel is on its own here, so these are 400 x 64 samples of one number.
    assert x.mean().item() == pytest.approx(0.6, abs=0.015)
    assert x.std().item() == pytest.approx(0.5, abs=0.015)
    assert setup.schedule.T < 1


@pytest.mark.slow
def test_a_compiled_network_and_another_size_are_taken(noise):
    network, own = unet(), scheduler()
    x, t = noise(0, 2, 1, 16, 16), torch.tensor(0.5, dtype=torch.float64)
    plain = s4s.from_diffusers((network, own), shape=[1, 16, 16], check=False)
    compiled = torch.compile(network, backend="eager")
    setup = s4s.from_diffusers((compiled, own), shape=[1, 16, 16], check=False)
    assert setup.shape == setup.params.shape == (1, 16, 16)
    torch.testing.assert_close(setup.denoiser(x, t), plain.denoiser(x, t))
    assert setup.model == plain.model


def test_guidance_is_recorded_and_a_solver_of_another_guidance_warns(text, noise):
    pipe = stable_diffusion(text)
    weak, strong = (
        s4s.from_diffusers(pipe, prompt="a cat", guidance=scale, check=False) for scale in (2, 7.5)
    )
    assert (weak.params.guidance, strong.params.guidance) == (2.0, 7.5)
    grid = s4s.time_logsnr(weak.schedule, 2)
    solver = Solver(s4s.ddim(grid), grid).learned_for(weak.model)
    x_T = s4s.initial_noise(weak, [0])
    solver.sample(weak.denoiser, x_T)  # in silence: warnings are errors
    with pytest.warns(UserWarning, match=r"guidance 2.0.*not for .*guidance 7.5"):
        solver.sample(strong.denoiser, x_T)


@pytest.mark.parametrize("prompts", ["a cat", 5, [], ["a", None]])
def test_prompts_are_one_text_or_a_list_of_texts(text, one_sentence, prompts):
    if isinstance(prompts, str):
        assert s4s.from_diffusers(stable_diffusion(text), prompts, check=False).condition is None
    else:
        with one_sentence("prompt must be a text, or a list of such", str(prompts)):
            s4s.from_diffusers(stable_diffusion(text), prompts, check=False)


THREE, FORTY = ["a cat", "a dog", "two owls"], [f"{i} owls" for i in range(40)]


@pytest.mark.parametrize(
    ("make", "many", "guidance", "shape"),
    [
        (stable_diffusion, THREE, 1.0, None),
        (stable_diffusion, FORTY, 7.5, None),
        (stable_diffusion_xl, FORTY, 5.0, None),
        (flux, THREE, 3.5, (4, 4, 4)),
        (lambda text: flux(text, guidance_embeds=False), FORTY, 3.5, (4, 4, 4)),
        (wan, THREE, 5.0, (4, 1, 4, 4)),
    ],
)
def test_each_seed_has_its_prompt_of_a_list(text, make, many, guidance, shape):
    pipe, options = make(text), {"guidance": guidance, "shape": shape, "check": False}
    setup = s4s.from_diffusers(pipe, many, **options)
    grid, seeds = s4s.time_logsnr(setup.schedule, 3), [0, 1, 2, len(many) + 1]
    solver, x_T = Solver(unipc(grid), grid), s4s.initial_noise(setup, seeds)
    together = solver.sample(setup.denoiser_for(seeds), x_T)
    for i, seed in enumerate(seeds):
        alone = s4s.from_diffusers(pipe, many[seed % len(many)], **options)
        x = solver.sample(alone.denoiser, x_T[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[:1], solver.sample(alone.denoiser, x_T[:1]), rtol=1e-2)


@pytest.mark.parametrize(
    ("make", "shape", "size"),
    [
        (stable_diffusion_xl, (4, 4, 8), (8, 16)),
        (flux, (4, 4, 8), (8, 16)),
        (wan, (4, 2, 4, 4), (32, 32)),
    ],
)
def test_latents_are_decoded_as_their_pipelines_do(text, noise, monkeypatch, make, shape, size):
    """Whatever the network is: what the decoder gets and gives is compared."""
    pipe, z = make(text).to(torch.float32), noise(0, 1, *shape).float()
    setup = setup_of(pipe, shape=shape, prompt="a")
    own = diffusers.FluxPipeline._pack_latents(z, *z.shape) if make is flux else z
    monkeypatch.setattr(
        type(pipe.scheduler), "step", lambda self, answer, t, x, **options: (own.to(x),)
    )
    height, width = size
    found = pipe("a", height=height, width=width, num_inference_steps=1, output_type="pt",
                 **({"num_frames": 5} if make is wan else {}))[0]  # fmt: skip
    expected = (setup.decode(z) / 2 + 0.5).clamp(0, 1)
    same(expected.transpose(1, 2) if make is wan else expected, found)


def test_a_solver_is_learned_for_a_video(text, one_sentence):
    setup = setup_of(wan(text), shape=(4, 2, 4, 4), prompt=["a cat", "a dog"], guidance=3.0)
    assert setup.params.distance == "l2"
    grid = s4s.time_uniform(setup.schedule, 2)
    teacher = s4s.make_teacher_set(setup, 2, 2)
    *_, last = s4s.learn_coefficients(Solver(s4s.ddim(grid), grid), setup, teacher, epochs=1)
    assert last.best.provenance["model"]["guidance"] == 3.0
    with one_sentence("does not denoise"):
        s4s.from_diffusers(wan(text), shape=(4, 2, 4, 4))


def test_sdxl_is_told_the_size_of_the_picture(text, noise):
    x, t = noise(0, 1, 4, 4, 4), torch.tensor(0.5, dtype=torch.float64)
    pipe = stable_diffusion_xl(text)
    small = setup_of(pipe).denoiser(x, t)
    assert torch.equal(setup_of(pipe, shape=(4, 4, 4)).denoiser(x, t), small)
    assert not torch.allclose(setup_of(pipe, shape=(4, 4, 8)).denoiser(x, t), small)


def test_levels_are_found_again_behind_an_installed_solver(text):
    zero = {"rescale_betas_zero_snr": True}
    for oracle in (
        scheduler(**SD),
        scheduler(beta_schedule="squaredcos_cap_v2"),
        scheduler(trained_betas=[0.001 * i for i in range(1, 101)], num_train_timesteps=100),
        scheduler(**SD, **zero, prediction_type="v_prediction"),
        diffusers.EulerDiscreteScheduler(**SD, **zero, prediction_type="v_prediction"),
    ):
        pipe = stable_diffusion(text)
        pipe.scheduler = oracle
        before = setup_of(pipe, prompt="a")
        grid = s4s.time_logsnr(before.schedule, 3)
        s4s.install(pipe, Solver(s4s.ddim(grid), grid))
        again = setup_of(pipe, prompt="a")
        assert again.schedule == before.schedule and again.model == before.model
        x, t = torch.ones(1, 4, 4, 4, dtype=torch.float64), before.schedule.t_of_s(1.0)
        assert torch.equal(again.denoiser(x, t), before.denoiser(x, t))


def test_a_solver_is_learned_for_several_classes_at_once(one_sentence):
    setup = s4s.from_diffusers(dit(), class_label=[3, 5], guidance=2.0, check=False, distance="l2")
    grid = s4s.time_uniform(setup.schedule, 2)
    teacher = s4s.make_teacher_set(setup, 4, 2)
    assert setup.condition(teacher.seeds.tolist()).tolist() == [0, 1, 0, 1, 0, 1]
    for learn in (s4s.learn_coefficients, s4s.learn_gauss_newton):
        *_, last = learn(Solver(s4s.ddim(grid), grid), setup, teacher, epochs=1)
        assert last.best.provenance["model"]["guidance"] == 2.0
    with one_sentence("denoiser_for"):
        last.best.sample(setup.denoiser, teacher.x_T)


def test_fine_tuned_weights_are_another_model():
    network, own = unet(), scheduler()
    before = s4s.from_diffusers((network, own), check=False).model
    with torch.no_grad():
        network.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert s4s.from_diffusers((network, own), check=False).model != before


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: "my/model", {}, ["DiffusionPipeline", "str", "from_pretrained"]),
        (lambda: (torch.nn.Linear(1, 1), scheduler()), {}, ["Linear", "UNet2DModel"]),
        (lambda: (unet(), torch), {}, ["module", "alphas_cumprod"]),
        (
            lambda: (unet(in_channels=2), scheduler()),
            {},
            ["2 channels", "answers 1"],
        ),
        (lambda: (unet(sample_size=None), scheduler()), {}, ["UNet2DModel", "shape=[1, 32, 32]"]),
        (lambda: (unet(), scheduler()), {"shape": [3, 8, 8]}, ["1 channels", "[3, 8, 8]"]),
        (lambda: (unet(), scheduler()), {"precision": "float16"}, ["precision", "leave it out"]),
        (dit, {"class_label": [1, 2.0]}, ["class_label", "0 to 999", "[1, 2.0]"]),
        (dit, {"class_label": [1, 1001]}, ["class_label", "0 to 999", "1001"]),
        (dit, {"class_label": []}, ["class_label", "a list of such", "[]"]),
        (lambda: (unet(), scheduler(prediction_type="score")), {}, ["prediction_type", "score"]),
        (lambda: (unet(), scheduler()), {"prompt": "a"}, ["UNet2DModel", "prompt"]),
        (lambda: (unet(), scheduler()), {"class_label": 3}, ["UNet2DModel", "class_label"]),
        (lambda: (unet(), scheduler()), {"guidance": 2.0}, ["guidance 2.0", "class_label"]),
        (lambda: (unet(), scheduler()), {"epochz": 3}, ["epochz", "epochs"]),
        (dit, {"class_label": 1001}, ["0 to 999", "1001"]),
        (dit, {"guidance": 4.0}, ["guidance 4.0", "class_label"]),
        (
            lambda: (unet(num_class_embeds=3), scheduler()),
            {"class_label": 1, "guidance": 2.0},
            ["guidance 2.0"],
        ),
        (lambda: (unet(num_class_embeds=3), scheduler()), {}, ["class_label", "0 to 2"]),
    ],
)
def test_what_cannot_be_done_is_told_in_one_sentence(one_sentence, make, options, words):
    with one_sentence(*words):
        setup_of(make(), **options)


def test_a_text_network_alone_is_refused_in_one_sentence(text, one_sentence):
    pipeline = stable_diffusion(text)
    with one_sentence("whole pipeline"):
        setup_of((pipeline.unet, pipeline.scheduler))


def test_a_missing_extra_is_told_in_one_sentence(monkeypatch, one_sentence):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with one_sentence("pip install diffusers transformers"):
        setup_of(None)
