"""SFD on prompts: forget a digit, a colour, or a pair of both, under their words in the prompt.

    python -m lab.prompts --forget zero --to one                   # from the teacher
    python -m lab.prompts --forget zero --to one --anchored        # from plain SiD, with an anchor
    python -m lab.prompts --forget "red zero" --to "red one"       # other zeros and other red digits stay
    python -m lab.prompts --forget none                            # plain SiD: nothing is forgotten

Each training caption is a label for `lab.distill`. The override of a caption that names "zero" is the same caption with
"one" in its place. With --resume, the options of a finished run evaluate it again.
"""
from dataclasses import dataclass

from edm_unet import BadInput, command, command_line, pick_device
from lab import distill
from lab.core.labels import run_folder
from lab.core.options import setting
from lab.prompts.captions import describe, override_captions, read_concepts
from lab.prompts.evaluator import PromptEvaluator
from lab.prompts.methods import recipe
from lab.prompts.network import load_prompt_teacher


@dataclass
class Settings(distill.Settings):
    forget: tuple = setting(("zero",), "words to forget, a pair in quotes, or none")
    to: tuple = setting(("random",), "words drawn instead: one, one for each, or random")
    data: str = setting("prompts", "the data set", option=False)


@dataclass
class Options(Settings):
    anchored: bool = setting(False, "SFD with an anchor: from plain SiD, near its images of captions to keep")


def parse(argv):
    """`Settings` of a command line: the recipe of the start, overridden by the given options."""
    given, forgets, anchored = distill.read_options(argv, Options, __doc__)
    return Settings(**{**recipe(forgets, given.get("init_from", ""), anchored), **given})


def main(argv):
    s = parse(argv)
    device = pick_device(s.device)
    teacher, info = load_prompt_teacher(s.teacher, device)
    c_f, c_o = read_concepts(s.forget, s.to)
    if not c_f and (s.guidance != 1 or s.lambda_anchor or s.forget_share):
        raise BadInput("--guidance, --lambda-anchor and --forget-share have no effect with --forget none")
    what = ["sid"]
    if c_f:
        words = "-".join(s.forget), "-".join(s.to)
        what = [f"forget{words[0]}", f"to{words[1]}", "anchored" if s.lambda_anchor else ""]
    s.out = s.out or run_folder("prompts", *what)
    print(f"{describe(c_f, c_o)}; {s.steps} steps on {device.type}, writing to {s.out}")
    evaluator = PromptEvaluator.find(teacher, info, c_f, c_o)
    labels = override_captions(c_f, c_o, teacher.settings.words)
    generator, content = distill.train(s, teacher, info, c_f, c_o, labels, evaluator)
    if evaluator:
        evaluator.evaluate(s.out, generator, content)
    print("next:", command_line("-m", "lab.prompts.sample", s.out, "--prompt", "a red zero", "--out", "zeros.png"))


if __name__ == "__main__":
    command(main)
