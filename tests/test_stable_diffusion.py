"""The command for Stable Diffusion trains, resumes, saves and draws on tiny pipelines with random weights."""
import copy
import json
import shutil

import pytest
import torch
from PIL import Image

from conftest import assert_same, module, run
from edm_unet import BadInput
from lab.adapters import stable_diffusion
from lab.core import runs
from sfd_minimal import Networks

pytest.importorskip("diffusers", reason="needs lab/requirements.txt")
pytest.importorskip("peft", reason="needs lab/requirements.txt")
pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers warn about their own future


def tiny_pipeline(path, predicts="epsilon"):
    """A folder with a pipeline of Stable Diffusion that draws 16x16 images from 8x8 latents, and a file of prompts."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(a + "</w>" for a in letters)]
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=24)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(names), hidden_size=32, intermediate_size=32,
                                        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=24,
                                        bos_token_id=0, eos_token_id=1, pad_token_id=1))
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, layers_per_block=1,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                              prediction_type=predicts, steps_offset=1, clip_sample=False)
    StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
                            ).save_pretrained(path / "pipeline")
    (path / "prompts.txt").write_text("a photo of bob\nbob at sea\na photo of a dog\na tree\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("diffusers") / "tiny")


def arguments(folder, out, *more):
    return [str(folder / "pipeline"), "--concept", "bob", "--override", "a man", "--prompts",
            str(folder / "prompts.txt"), "--steps", "5", "--batch", "4", "--micro-batch", "2", "--lr", "1e-3",
            "--lr-fake", "1e-3", "--device", "cpu", "--out", str(out), *more]


def weights(pipeline):
    return stable_diffusion.load_pipeline(pipeline).unet.state_dict()


@pytest.mark.parametrize("lora", [0, 4])
def test_what_learns_is_moved_and_what_is_frozen_is_not(lora, folder, tmp_path):
    out = tmp_path / "run"
    stable_diffusion.main(arguments(folder, out, "--dtype", "float32", "--lora", str(lora)))
    before, after = weights(folder / "pipeline"), weights(out / "pipeline")
    assert before.keys() == after.keys(), "LoRA is merged into the network that is saved"
    moved = {k.rsplit(".", 1)[0] for k in before if not torch.allclose(before[k], after[k], atol=1e-5)}
    attention = {k for k in moved if k.endswith(("to_q", "to_k", "to_v"))}
    assert attention and (moved == attention if lora else len(moved) > 2 * len(attention))
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 5 and all(("lora" in k) == bool(lora) for k in saved["parts"]["generator"])


@pytest.mark.parametrize("predicts", ["v_prediction", "sample"])
def test_networks_of_every_prediction_are_trained(predicts, tmp_path):
    folder, out = tiny_pipeline(tmp_path / "tiny", predicts), tmp_path / "run"
    stable_diffusion.main(arguments(folder, out, "--steps", "2"))
    before, after = weights(folder / "pipeline"), weights(out / "pipeline")
    assert any(not torch.allclose(before[k], after[k], atol=1e-5) for k in before)
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.slow
def test_a_run_draws_the_same_images_in_a_fresh_process(folder, tmp_path):
    out = tmp_path / "run"
    stable_diffusion.main(arguments(folder, out, "--steps", "2"))
    options = ["--prompt", "a photo of bob", "--n", "2", "--device", "cpu", "--out"]
    stable_diffusion.main(["draw", str(out), *options, str(tmp_path / "here.png")])
    run(*module("lab.adapters.stable_diffusion"), "draw", out, *options, "there.png", cwd=tmp_path)
    with Image.open(tmp_path / "here.png") as here, Image.open(tmp_path / "there.png") as there:
        assert here.size == (32, 16) and here.tobytes() == there.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [0, 1, 4])
def test_the_saved_pipeline_draws_what_was_trained(lora, dtype, folder, tmp_path):
    """Also where the weights moved by less than bfloat16 resolves."""
    pipe = stable_diffusion.load_pipeline(folder / "pipeline")
    teacher = stable_diffusion.denoiser(pipe, pipe.unet.to(dtype).requires_grad_(False).eval(), dtype)
    torch.manual_seed(0)
    average = stable_diffusion.begin(stable_diffusion.Settings(lora=lora), teacher).average
    with torch.no_grad():
        for p in stable_diffusion.learning_weights(average).values():
            p.add_(1e-3 * torch.randn_like(p))
    z, c = torch.randn(2, *teacher.shape), stable_diffusion.token_states(pipe, ["a dog", "bob"])

    def drawn(network):
        network = copy.deepcopy(network)
        network.net.dtype = torch.float32
        with torch.no_grad():
            return network.float()(2.5 * z, 2.5, c)

    before, trained = drawn(teacher), drawn(average)
    stable_diffusion.save_pipeline(pipe, average, lora, tmp_path / "pipeline")
    saved = stable_diffusion.load_pipeline(tmp_path / "pipeline")
    saved = drawn(stable_diffusion.denoiser(saved, saved.unet, torch.float32))
    assert (trained - before).norm() > 0 and (saved - trained).norm() < 0.02 * (trained - before).norm()


def test_a_run_goes_on_to_the_same_weights(folder, tmp_path, monkeypatch):
    stable_diffusion.main(arguments(folder, tmp_path / "whole"))
    save = runs.Run.save

    def save_and_stop(self):
        save(self)
        if self.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Run, "save", save_and_stop)
        patch.setattr(runs, "SAVING_SHARE", 0)
        stable_diffusion.main(arguments(folder, tmp_path / "cut", "--save-every", "1e-9"))
    stable_diffusion.main(arguments(folder, tmp_path / "cut", "--resume"))
    assert_same(weights(tmp_path / "whole" / "pipeline"), weights(tmp_path / "cut" / "pipeline"))


def split(folder, lines, **more):
    """What `split_prompts` makes of lines, as text."""
    tokenizer = stable_diffusion.load_pipeline(folder / "pipeline").tokenizer
    s = stable_diffusion.Settings(**{"concept": "bob", "override": "a man", **more})
    return [[tokenizer.decode(ids).replace(" ", "") for ids in prompts]
            for prompts in stable_diffusion.split_prompts(s, tokenizer, lines)]


def test_the_override_takes_the_place_of_the_concept(folder):
    """A tenth of the prompts is replaced by the empty prompt, which is kept, where there is guidance."""
    pipe = stable_diffusion.load_pipeline(folder / "pipeline")
    s = stable_diffusion.Settings(concept="bob", override="a man")
    prompts = stable_diffusion.split_prompts(s, pipe.tokenizer, stable_diffusion.read_lines(folder / "prompts.txt"))
    states = [stable_diffusion.states_of_ids(pipe, part) for part in prompts]
    null = stable_diffusion.token_states(pipe, [""])

    def rows_of(rows, *prompts):
        states = stable_diffusion.token_states(pipe, list(prompts))
        return torch.stack([(row == states).flatten(1).all(1).any() for row in rows])

    c_phi, c_psi, forgotten = stable_diffusion.prompt_drawer(s, *states, null)(1000)
    empty = rows_of(c_psi, "")
    assert 400 < forgotten.sum() < 500 and 60 < empty.sum() < 140 and not (empty & forgotten).any()
    assert rows_of(c_psi[forgotten], "a photo of bob", "bob at sea").all()
    assert rows_of(c_phi[forgotten], "a photo of a man", "a man at sea").all()
    assert torch.equal(c_phi[~forgotten], c_psi[~forgotten])
    assert rows_of(c_psi[~forgotten & ~empty], "a photo of a dog", "a tree").all()
    s.guidance = 1
    assert not rows_of(stable_diffusion.prompt_drawer(s, *states, null)(1000)[1], "").any()


def test_the_concept_is_found_as_whole_words_in_upper_and_lower_case(folder):
    lines = ["A photo of BOB", "Bob  at sea and bob", "a bobcat", "kabob", "bo b"]
    forgotten, overridden, kept = split(folder, lines)
    assert forgotten == ["aphotoofbob", "bobatseaandbob"] and kept == ["abobcat", "kabob", "bob"]
    assert overridden == ["aphotoofaman", "amanatseaandaman"]
    assert split(folder, ["brad pitt", "brad", "pitt at sea"], concept="Brad  Pitt") == [
        ["bradpitt"], ["aman"], ["brad", "pittatsea"]]


def test_the_prompts_of_each_kind_are_counted_and_shown(folder, capsys):
    split(folder, ["Bob", "a dog", "bob at sea", "a tree", "a cat", "a photo of bob"])
    assert capsys.readouterr().out.splitlines() == [
        "prompts forgotten: 3, such as 'Bob' and 'bob at sea'", "prompts kept: 3, such as 'a dog' and 'a tree'"]


def test_token_states_are_those_of_the_pipeline(folder):
    pipe = stable_diffusion.load_pipeline(folder / "pipeline")
    prompts = ["a photo of Bob", "", "x " * 22]
    expected = torch.cat([pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts])
    assert torch.equal(stable_diffusion.token_states(pipe, prompts), expected)


class Toy(torch.nn.Module):
    """sin(a x + b c) + sigma, a denoiser with two weights."""
    shape, sigma_data = (1, 2, 2), 1.0

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.tensor(a)), torch.nn.Parameter(torch.tensor(b))

    def forward(self, x, sigma, c):
        return torch.sin(self.a * x + self.b * c.view(-1, 1, 1, 1)) + sigma


def published_step(phi, theta, psi, z, c_phi, c_psi, null, forgotten, s, kappa):
    """One step of SFD with the published guidance and this project's noise, with gradient descent: eqs. in code.

    Returns L_psi, L_keep, L_forget and the four weights of generator and fake score after the step.
    """
    theta, psi, B = copy.deepcopy(theta), copy.deepcopy(psi), len(z)
    null = null.expand_as(c_psi)
    sigma_init = torch.full((B, 1, 1, 1), s.sigma_init)
    x_g = theta(s.sigma_init * z, sigma_init, c_psi)
    image = x_g.detach()

    sigma = torch.exp(s.p_mean + s.p_std * torch.randn(B)).view(B, 1, 1, 1)
    x_t = image + sigma * torch.randn_like(image)
    D = psi(x_t, sigma, null) + kappa[1] * (psi(x_t, sigma, c_psi) - psi(x_t, sigma, null))
    L_psi = ((1 + 1 / sigma ** 2) * (D - image) ** 2).sum() / B
    slopes = torch.autograd.grad(L_psi, [psi.a, psi.b])
    with torch.no_grad():
        psi.a -= s.lr_fake * slopes[0]
        psi.b -= s.lr_fake * slopes[1]

    low, high = s.sigma_min ** (1 / 7), s.sigma_max ** (1 / 7)
    sigma = (low + s.u_max * torch.rand(B) * (high - low)).pow(7).view(B, 1, 1, 1)
    x_t = x_g + sigma * torch.randn_like(x_g)
    teacher = phi(x_t, sigma, null) + kappa[4] * (phi(x_t, sigma, c_phi) - phi(x_t, sigma, null))
    fake_2 = psi(x_t, sigma, null) + kappa[2] * (psi(x_t, sigma, c_psi) - psi(x_t, sigma, null))
    fake_3 = psi(x_t, sigma, null) + kappa[3] * (psi(x_t, sigma, c_psi) - psi(x_t, sigma, null))
    omega = (teacher - x_g).abs().mean((1, 2, 3)).detach()
    S = ((teacher - fake_2) * (fake_3 - x_g)).sum((1, 2, 3)) / omega
    slopes = torch.autograd.grad(S.sum() / B, [theta.a, theta.b])
    weights = [theta.a - s.lr * slopes[0], theta.b - s.lr * slopes[1], psi.a, psi.b]
    return torch.stack([L_psi, S[~forgotten].sum() / B, S[forgotten].sum() / B, *weights]).detach()


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_a_step_is_that_of_the_published_guidance(guidance):
    """All four kappas are --guidance. Each of them matters."""
    s = stable_diffusion.Settings(guidance=guidance, batch=4, micro_batch=3, lr=0.01, lr_fake=0.02)
    phi, theta, psi = Toy(0.5, 0.8), Toy(0.4, 0.7), Toy(0.6, 0.9)
    c_phi, c_psi = torch.tensor([1.0, 2.0, 3.0, 0.3]), torch.tensor([-1.0, -2.0, 3.0, 0.3])
    c_phi, c_psi, null = c_phi.view(4, 1, 1), c_psi.view(4, 1, 1), torch.full((1, 1, 1), 0.3)
    forgotten = torch.tensor([True, True, False, False])

    def expected(**changes):
        torch.manual_seed(0)
        kappa = {i: changes.get(f"kappa_{i}", guidance) for i in (1, 2, 3, 4)}
        return published_step(phi, theta, psi, torch.randn(4, 1, 2, 2), c_phi, c_psi, null, forgotten, s, kappa)

    golden = expected()
    for name in ("kappa_1", "kappa_2", "kappa_3", "kappa_4"):
        assert not torch.allclose(expected(**{name: 2.0}), golden, rtol=1e-2)

    n = Networks(phi, theta, copy.deepcopy(theta), psi, torch.optim.SGD(theta.parameters(), 1.0),
                 torch.optim.SGD(psi.parameters(), 1.0))
    torch.manual_seed(0)
    terms = next(stable_diffusion.distill(s, n, lambda batch: (c_phi, c_psi, forgotten), null))
    found = torch.stack([*terms.values(), theta.a, theta.b, psi.a, psi.b]).detach()
    torch.testing.assert_close(found, golden, rtol=1e-4, atol=1e-5)


def test_prompts_that_do_not_serve_are_refused(folder, tmp_path):
    """None with the concept, an empty override or concept, the two the same, one that is too long, none to keep."""
    long, all_kinds = tmp_path / "long.txt", tmp_path / "all.txt"
    long.write_text("bob\na dog\nbob " + "x " * 30)
    all_kinds.write_text("bob\nbob at sea\n")
    for more in (["--concept", "zoe"], ["--override", ""], ["--concept", " "], ["--override", "Bob"],
                 ["--prompts", str(long)], ["--prompts", str(all_kinds)]):
        with pytest.raises(BadInput):
            stable_diffusion.main(arguments(folder, tmp_path / "run", *more))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_prompt_files_with_and_without_a_mark_are_read(encoding, tmp_path):
    text = "a café\r\n\n  bob at sea \n"
    content = ("\ufeff" if encoding == "utf-16-be" else "") + text
    (tmp_path / "prompts.txt").write_bytes(content.encode(encoding))
    assert stable_diffusion.read_lines(tmp_path / "prompts.txt") == ["a café", "bob at sea"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
def test_prompt_files_in_another_encoding_are_refused_in_one_line(encoding, folder, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("bob\na café of bob\na dog\n".encode(encoding))
    with pytest.raises(BadInput, match=r"prompts\.txt is not UTF-8 .*: save the file as UTF-8$"):
        stable_diffusion.main(arguments(folder, tmp_path / "run", "--prompts", str(path)))
    with pytest.raises(BadInput, match="missing.txt"):
        stable_diffusion.main(arguments(folder, tmp_path / "run", "--prompts", str(tmp_path / "missing.txt")))


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(BadInput):
        stable_diffusion.load_pipeline(tmp_path)


def test_a_schedule_that_ends_too_early_is_refused(folder, tmp_path):
    pipe = stable_diffusion.load_pipeline(folder / "pipeline")
    scheduler = pipe.scheduler
    pipe.register_modules(scheduler=type(scheduler).from_config(scheduler.config, beta_end=0.008))
    pipe.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text((folder / "prompts.txt").read_text())
    with pytest.raises(BadInput):
        stable_diffusion.main(arguments(tmp_path, tmp_path / "run"))


@pytest.mark.parametrize("where, changes, named", [
    ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "StableDiffusionXLPipeline"),
    ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, "StableDiffusionInpaintPipeline"),
    ("model_index.json", {"_class_name": "DDPMPipeline"}, "DDPMPipeline"),  # unconditional
    ("model_index.json", {"_class_name": "DiTPipeline"}, "DiTPipeline"),    # class-conditional
    ("model_index.json", {"text_encoder": [None, None]}, "no text_encoder"),
    ("unet/config.json", {"in_channels": 9}, "inpainting"),
    ("unet/config.json", {"num_class_embeds": 10}, "class-conditional"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "class-conditional"),
    ("unet/config.json", {"addition_embed_type": "text_time"}, "Stable Diffusion XL"),
    ("unet/config.json", {"time_cond_proj_dim": 8}, "guidance as an input"),
    ("unet/config.json", {"sample_size": [8, 12]}, "not square .*8x12"),
    ("unet/config.json", {"sample_size": None}, "without a sample_size"),
])
def test_pipelines_of_other_kinds_are_refused_by_name_before_weights_are_read(where, changes, named, folder, tmp_path):
    shutil.copytree(folder / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((tmp_path / "pipeline" / where).read_text())
    (tmp_path / "pipeline" / where).write_text(json.dumps({**settings, **changes}))
    shutil.copy(folder / "prompts.txt", tmp_path)
    with pytest.raises(BadInput, match=named):
        stable_diffusion.main(arguments(tmp_path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_square_sizes_in_two_numbers_are_taken(folder):
    assert stable_diffusion.latent_shape({"sample_size": [8, 8], "in_channels": 4}) == (4, 8, 8)


def test_a_run_goes_on_with_its_own_pipeline_alone(folder, tmp_path):
    """Another pipeline at the same path is another one. The same pipeline at another path is the same one."""
    for name in ("same", "other"):
        shutil.copytree(folder, tmp_path / name)
    out = tmp_path / "run"
    stable_diffusion.main(arguments(tmp_path / "other", out, "--steps", "1"))
    pipe = stable_diffusion.load_pipeline(folder / "pipeline")
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] += 1e-3
    pipe.save_pretrained(tmp_path / "other" / "pipeline")
    with pytest.raises(BadInput, match="cannot resume .* pipeline was"):
        stable_diffusion.main(arguments(tmp_path / "other", out, "--steps", "1", "--resume"))
    stable_diffusion.main(arguments(tmp_path / "same", out, "--steps", "1", "--resume"))


def test_what_cannot_be_drawn_is_refused_in_one_line_before_drawing(folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    stable_diffusion.main(arguments(folder, out, "--steps", "1", "--lora", "4"))
    given = {"--prompt": "bob", "--out": str(tmp_path / "images.png"), "--device": "cpu"}

    def drawn(folder, **changes):
        options = {**given, **{f"--{name}": value for name, value in changes.items()}}
        stable_diffusion.main(["draw", str(folder), *(word for pair in options.items() for word in pair)])

    drawn(out)
    pipe = stable_diffusion.load_pipeline(out / "pipeline")
    monkeypatch.setattr(stable_diffusion, "denoiser", lambda *_: pytest.fail("drawing has started"))
    with pytest.raises(BadInput, match="--prompt"):
        drawn(out, prompt="")
    with pytest.raises(BadInput, match="must end as a picture does"):
        drawn(out, out=str(tmp_path / "images.pgn"))
    with pytest.raises(BadInput, match="no finished run"):
        drawn(tmp_path)
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] += 1e-3
    pipe.save_pretrained(out / "pipeline")
    with pytest.raises(BadInput, match="not the pipeline that this run saved"):
        drawn(out)


def test_a_scheduler_without_a_schedule_of_steps_is_refused_by_name(folder, tmp_path):
    from diffusers import EDMEulerScheduler
    pipe = stable_diffusion.load_pipeline(folder / "pipeline")
    pipe.register_modules(scheduler=EDMEulerScheduler())
    pipe.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(BadInput, match="EDMEulerScheduler"):
        stable_diffusion.load_pipeline(tmp_path / "pipeline")
