"""The command for Stable Diffusion trains, resumes, saves and draws on tiny pipelines with random weights."""
import copy
import json

import pytest
import torch
from PIL import Image

from conftest import assert_same, module, run
from edm_unet import BadInput
from lab.adapters import stable_diffusion
from lab.core import runs

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


def test_the_override_takes_the_place_of_the_concept(folder):
    """The concept is the negative prompt there. Other prompts are kept, and guided away from the null prompt."""
    pipe = stable_diffusion.load_pipeline(folder / "pipeline")
    s = stable_diffusion.Settings(concept="bob", override="a man", prompts=str(folder / "prompts.txt"))
    draw_prompts = stable_diffusion.prompt_drawer(s, pipe, torch.device("cpu"))
    c_phi, c_psi, forgotten, negative = draw_prompts(64)

    def all_among(rows, *prompts):
        states = stable_diffusion.token_states(pipe, list(prompts))
        return all((row == states).flatten(1).all(1).any() for row in rows)

    assert 0 < forgotten.sum() < 64
    assert all_among(c_psi[forgotten], "a photo of bob", "bob at sea")
    assert torch.equal(negative[forgotten], c_psi[forgotten])
    assert all_among(c_phi[forgotten], "a photo of a man", "a man at sea")
    assert torch.equal(c_phi[~forgotten], c_psi[~forgotten]) and all_among(negative[~forgotten], "")
    assert all_among(c_psi[~forgotten], "a photo of a dog", "a tree")


def test_prompts_that_do_not_serve_are_refused(folder, tmp_path):
    """None with the concept, an empty override, one that the text encoder would cut."""
    long = tmp_path / "long.txt"
    long.write_text("bob\na dog\nbob " + "x " * 30)
    for more in (["--concept", "zoe"], ["--override", ""], ["--prompts", str(long)]):
        with pytest.raises(BadInput):
            stable_diffusion.main(arguments(folder, tmp_path / "run", *more))


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
