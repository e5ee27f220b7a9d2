"""lab/stable_diffusion.py on tiny pipelines with random weights: what can be said of it without real ones."""
import json

import pytest
import torch
from PIL import Image

from conftest import ROOT, module, run
from lab import run as runs
from lab import stable_diffusion as example
from lab.errors import BadInput

pytest.importorskip("diffusers", reason="needs lab/requirements.txt")
pytest.importorskip("peft", reason="needs lab/requirements.txt")
pytestmark = pytest.mark.filterwarnings("default")  # other people's code warns of its own future


def tiny_pipeline(path, predicts):
    """A Stable Diffusion of 32 channels that draws 16x16 images out of 8x8 latents."""
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


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request, tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("diffusers") / request.param, request.param)


def arguments(folder, out, *more):
    return [str(folder / "pipeline"), "--concept", "bob", "--override", "a man", "--prompts",
            str(folder / "prompts.txt"), "--steps", "5", "--batch", "4", "--micro-batch", "2", "--lr", "1e-3",
            "--lr-fake", "1e-3", "--device", "cpu", "--out", str(out), *more]


def weights(pipeline):
    return example.load_pipeline(pipeline).unet.state_dict()


@pytest.mark.parametrize("how", [["--dtype", "float32"], ["--dtype", "float32", "--lora", "4"]])
def test_five_steps_and_a_pipeline_that_draws(how, folder, tmp_path):
    """What learns learns, what is frozen stays, and what was saved draws the same image in a fresh process."""
    out = tmp_path / "run"
    example.main(arguments(folder, out, *how))
    before, after = weights(folder / "pipeline"), weights(out / "pipeline")
    assert before.keys() == after.keys(), "LoRA is merged into the network that is saved"
    moved = {k.rsplit(".", 1)[0] for k in before if not torch.allclose(before[k], after[k], atol=1e-5)}
    queries = {k for k in moved if k.endswith(("to_q", "to_k", "to_v"))}
    assert queries and (moved == queries if "--lora" in how else len(moved) > 2 * len(queries))
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 5 and all(("lora" in k) == ("--lora" in how) for k in saved["state"]["generator"])
    ask = ["--prompt", "a photo of bob", "--n", "2", "--device", "cpu", "--out"]
    example.main(["draw", str(out), *ask, str(tmp_path / "here.png")])
    run(*module("lab.stable_diffusion"), "draw", out, *ask, "there.png", cwd=tmp_path)
    with Image.open(tmp_path / "here.png") as here, Image.open(tmp_path / "there.png") as there:
        assert here.size == (32, 16) and here.tobytes() == there.tobytes()


def test_it_goes_on_to_the_same_weights(folder, tmp_path, monkeypatch):
    example.main(arguments(folder, tmp_path / "whole"))
    save = runs.Run.save

    def save_and_stop(self):
        save(self)
        if self.step == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Run, "save", save_and_stop)
        patch.setattr(runs, "APART", 0)
        example.main(arguments(folder, tmp_path / "cut", "--save-every", "1e-9"))
    example.main(arguments(folder, tmp_path / "cut", "--resume"))
    a, b = (weights(tmp_path / name / "pipeline") for name in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_who_is_asked_about_what(folder):
    """The override stands where the concept stood, which is the negative prompt; others are kept, against the null."""
    pipe = example.load_pipeline(folder / "pipeline")
    s = example.Settings(concept="bob", override="a man", prompts=str(folder / "prompts.txt"))
    c_phi, c_psi, forgotten, negative = example.asker(s, pipe, torch.device("cpu"))(64)
    of = lambda *prompts: example.states(pipe, list(prompts))
    among = lambda rows, known: all((row == known).flatten(1).all(1).any() for row in rows)
    assert 0 < forgotten.sum() < 64
    assert among(c_psi[forgotten], of("a photo of bob", "bob at sea"))
    assert torch.equal(negative[forgotten], c_psi[forgotten])
    assert among(c_phi[forgotten], of("a photo of a man", "a man at sea"))
    assert torch.equal(c_phi[~forgotten], c_psi[~forgotten]) and among(negative[~forgotten], of(""))
    assert among(c_psi[~forgotten], of("a photo of a dog", "a tree"))


@pytest.mark.parametrize("more, says", [
    (["--concept", "zoe"], "must hold prompts with --concept 'zoe'"), (["--override", ""], "must hold prompts"),
    (["--prompts", "{}/long.txt"], "longer than the 24 tokens")])
def test_bad_prompts_are_one_line(more, says, folder, tmp_path):
    (tmp_path / "long.txt").write_text("bob\na dog\nbob " + "x " * 30)
    with pytest.raises(BadInput, match=says):
        example.main(arguments(folder, tmp_path / "run", *(word.replace("{}", str(tmp_path)) for word in more)))


def test_what_is_no_pipeline_is_one_line(tmp_path):
    with pytest.raises(BadInput, match="no pipeline on this disk"):
        example.load_pipeline(tmp_path)


def test_its_first_lines_say_that_it_was_never_run_on_real_weights():
    source = (ROOT / "lab" / "stable_diffusion.py").read_text()
    assert "NEVER RUN ON REAL WEIGHTS" in "".join(source[:400]) and source.count("\n") <= 200
