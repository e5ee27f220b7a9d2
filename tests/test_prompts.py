"""Prompts are a variant: a word of a prompt is forgotten in the images, by the method of labels, and evaluated so."""
import copy
import dataclasses
import json

import pytest
import torch

from conftest import CPU, ROOT
from edm_unet import BadInput, digest, load_file, pack, save_file
from lab import distill
from lab.core.images import to_uint8
from lab.evaluate import draw
from lab.evaluate.draw import load_generator, sampler
from lab.prompts import compare, evaluator, methods, sample, train_teacher
from lab.prompts.__main__ import Settings
from lab.prompts.__main__ import main as run_on_prompts
from lab.prompts.captions import (COLOURS, DIGITS, FIRST_DIGITS, NEVER_COLOURED, TEMPLATES, UNSEEN_PAIRS,
                                  UNSEEN_TEMPLATES, WORDS, batches, captions, inked, named_words, numbers,
                                  override_captions, read_concepts, rgb, tokens)
from lab.prompts.evaluator import (COUNTS, NO_COLOUR, PromptEvaluator, colour_of, common_prompts, forgotten_prompts,
                                   ink_of, prompt_metrics)
from lab.prompts.network import CrossAttention, PromptDenoiser, PromptSettings, load_prompt_network
from sfd_minimal import begin

TEACHERS = ROOT / "teachers"
ZERO, ONE = {"digit": "zero"}, {"digit": "one"}
NET = PromptSettings(channels=3, model_channels=16, channel_mult=(1,), num_blocks=1, patch=4)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The file of a teacher that reads prompts and has learned nothing."""
    path = tmp_path_factory.mktemp("a teacher") / "reader.pt"
    torch.manual_seed(0)
    save_file(path, {"data": "prompts", "classes": FIRST_DIGITS, "made_by": dict(p_mean=0.2, guidance=1.0),
                     **pack(PromptDenoiser(NET))})
    return path


@pytest.fixture
def few_images(monkeypatch):
    """Every set of prompts of an evaluation has few of them."""
    monkeypatch.setattr(evaluator, "COUNTS", dict.fromkeys(evaluator.COUNTS, 1))
    monkeypatch.setattr(evaluator, "FORGOTTEN", dict.fromkeys(evaluator.FORGOTTEN, 6))


def words_of(row):
    """The prompt of a row of tokens."""
    return " ".join(WORDS[i - 1] for i in row.tolist() if i)


# ----------------------------------------------------------------------------------------------------- words and images

def test_no_training_caption_is_held_out():
    seen = {caption.text: numbers(named_words(caption.text)) for caption in captions()}
    held_out = {caption.text: numbers(named_words(caption.text)) for caption in captions(held_out=True)}
    assert all(len(held_out[text]) < 2 for text in seen.keys() & held_out.keys())
    pairs = {(meaning["digit"], meaning["colour"]) for meaning in seen.values() if len(meaning) == 2}
    assert pairs == {(k, h) for k in range(10) for h in range(6)} - set(UNSEEN_PAIRS) and len(UNSEEN_PAIRS) == 6
    for caption in captions():
        assert (DIGITS[caption.digit], COLOURS[caption.colour]) not in UNSEEN_PAIRS, "nor is an image of such a pair"
    coloured = {named_words(text)["digit"] for text, meaning in seen.items() if len(meaning) == 2}
    assert set(DIGITS) - coloured == set(NEVER_COLOURED)
    assert not seen.keys() & {caption.text for caption in captions(UNSEEN_TEMPLATES)} and len(UNSEEN_TEMPLATES) == 2
    assert len(TEMPLATES) >= 8
    assert {word for text in seen for word in text.split()} == set(WORDS), "every word is trained on"
    for kind in (DIGITS, COLOURS):
        assert all(list(kind.values()).count(number) == 2 for number in kind.values())


def test_words_become_tokens():
    (row,) = tokens(["A red, zero."], WORDS)
    assert words_of(row) == "a red zero" and tokens([""], WORDS).sum() == 0
    with pytest.raises(BadInput, match="'read'.* red"):  # the nearest word
        tokens(["a read zero"], WORDS)
    with pytest.raises(BadInput):
        tokens(["a a a a a a a a a"], WORDS)


def test_ink_has_the_colour_of_its_name():
    torch.manual_seed(0)
    grey = torch.randint(256, (600, 1, 28, 28), dtype=torch.uint8)
    colour = torch.arange(600) % 6
    x = inked(grey, colour)
    assert x.shape == (600, 3, 28, 28) and x.min() == -1 and x.max() <= 1
    assert torch.equal(colour_of(to_uint8(x)), colour)
    assert (ink_of(to_uint8(x)).int() - grey.int()).abs().max() <= 3
    assert x[colour == 1][:, 2].max() < x[colour == 1].amax((2, 3))[:, :2].min(), "yellow has little blue"
    grey_and_black = torch.cat([grey[:1].expand(1, 3, -1, -1), torch.zeros(1, 3, 28, 28, dtype=torch.uint8)])
    assert colour_of(grey_and_black).tolist() == [NO_COLOUR, NO_COLOUR]
    red_green_cyan = rgb(torch.tensor([0.0, 2.0, 3.0]), torch.tensor(1.0), torch.tensor(0.8))
    assert torch.allclose(red_green_cyan, torch.tensor([[0.8, 0, 0], [0, 0.8, 0], [0, 0.8, 0.8]]))


def test_a_batch_shows_what_its_captions_say():
    torch.manual_seed(0)
    labels = torch.arange(100) % 10
    images = (25 * labels + 10).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)  # a grey for each digit
    x, c = next(batches(images, labels, 2000, WORDS))
    meanings = [numbers(named_words(words_of(row))) for row in c]
    assert {len(meaning) for meaning in meanings} == {0, 1, 2}
    brightest = (x.amax((1, 2, 3)) + 1) / 2 * 255
    for meaning, colour, value in zip(meanings, colour_of(to_uint8(x)).tolist(), brightest.tolist()):
        assert meaning.get("colour", colour) == colour
        if "digit" in meaning:  # the value of ink is 0.75 to 1
            assert 0.74 * (25 * meaning["digit"] + 10) < value <= 25 * meaning["digit"] + 10.01

    without = [{"digit": "0"}, {"colour": "red"}]
    x, c = next(batches(images[labels > 0], labels[labels > 0], 500, WORDS, without))
    assert set(colour_of(to_uint8(x)).tolist()) == {1, 2, 3, 4, 5}
    assert not any({"zero", "0", "red", "crimson"} & set(words_of(row).split()) for row in c)


# ----------------------------------------------------------------------------------------------- concepts and overrides

@pytest.mark.parametrize("forget, to", [
    ("zer", "one"), ("zero", "red"), ("zero", "0"), ("a zero", "one"), ("red zero", "one"), ("red red", "blue"),
    ("zero,one", "two,three,four"), ("red three", "red one"), ("red zero", "red three"), ("none", "one"),
    ("red,yellow,green,cyan,blue,magenta", "random")])
def test_words_that_do_not_fit_are_refused(forget, to):
    with pytest.raises(BadInput) as e:
        read_concepts(tuple(forget.split(",")), tuple(to.split(",")))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("forget, to, unnamed", [
    (("zero",), ("one",), {"0"}), (("red",), ("blue",), {"crimson"}), (("zero", "0"), ("one", "1"), set())])
def test_a_forgotten_word_is_exchanged_and_its_synonym_left_out(forget, to, unnamed):
    override, rows = override_captions(*read_concepts(forget, to), WORDS)
    exchanged, changed = dict(zip(forget, to)), 0
    for i, j in enumerate(override.tolist()):
        own, given = words_of(rows[i]).split(), words_of(rows[j]).split()
        assert not unnamed & set(own)
        assert [exchanged.get(word, word) for word in own] == given
        assert bool(set(forget) & set(own)) == (i != j)
        changed += i != j
    assert changed > 50


def test_a_forgotten_pair_leaves_each_half_alone():
    override, rows = override_captions(*read_concepts(("red zero",), ("red one",)), WORDS)
    changed = {words_of(rows[i]) for i, j in enumerate(override.tolist()) if i != j}
    kept = {words_of(rows[i]) for i, j in enumerate(override.tolist()) if i == j}
    assert "a red zero" in changed and {"a blue zero", "a red one", "a zero", "a red digit"} <= kept
    assert not {"a crimson zero", "a red 0", "a crimson 0"} & (changed | kept)


def test_two_concepts_in_one_caption_are_both_exchanged(capsys):
    override, rows = override_captions(*read_concepts(("zero", "red"), ("one", "blue")), WORDS)
    overrides_of = {words_of(rows[i]): words_of(rows[j]) for i, j in enumerate(override.tolist())}
    assert overrides_of["a red zero"] == "a blue one"
    assert "a red five" not in overrides_of, "a blue five is held out"
    assert "note" in capsys.readouterr().out
    read_concepts(("zero",), ("one",))
    assert "note" not in capsys.readouterr().out


def test_random_is_each_other_digit_equally_often():
    override, rows = override_captions(*read_concepts(("one",), ("random",)), WORDS)
    given = [words_of(rows[j]) for i, j in enumerate(override.tolist()) if words_of(rows[i]) == "a one"]
    assert sorted(set(given)) == sorted(f"a {word}" for word in FIRST_DIGITS if word != "one")
    assert len({given.count(text) for text in given}) <= 2, "pairs that are held out are missing"


# ---------------------------------------------------------------------------------------------------------- the network

def test_a_condition_is_tokens_or_their_states_or_none_for_the_empty_prompt():
    torch.manual_seed(0)
    D, x, c = PromptDenoiser(NET).eval(), torch.randn(3, 3, 28, 28), tokens(["a red zero", "", "a blue 7"], WORDS)
    D_x = D(x, 1.0, c)
    assert torch.allclose(D(x, 1.0, D.text(c)), D_x, atol=1e-6) and torch.equal(D(x, 1.0, None)[1], D_x[1])
    assert not torch.allclose(D(x, 1.0, None)[0], D_x[0], atol=1e-4)
    assert not torch.allclose(D(x, 1.0, c.flip(1))[0], D_x[0], atol=1e-4), "the order of words counts"
    assert D.conditions.shape == (len(WORDS), NET.length) and words_of(D.conditions[3]) == WORDS[3]


def test_sfd_moves_the_network_and_not_its_text_encoder(reader):
    teacher, _ = load_prompt_network(reader)
    teacher.bf16 = False
    s = Settings(steps=2, batch=16)
    override, rows = override_captions([ZERO], [[ONE]], WORDS)
    n = begin(teacher, s)
    given, forward = [], n.teacher.forward

    def recorded(x, sigma, c):
        given.extend(c)
        return forward(x, sigma, c)

    n.teacher.forward = recorded
    torch.manual_seed(0)
    for _ in distill.distill(s, n, override, rows):
        pass
    for network in (n.generator, n.fake):
        before, after = teacher.state_dict(), network.state_dict()
        moved = {name for name in before if not torch.equal(after[name], before[name])}
        assert any(".cross.to_k" in name for name in moved) and not any(name.startswith("text.") for name in moved)
    words = [words_of(row).split() for row in given]
    assert len(words) == 32 and not any("zero" in prompt for prompt in words)
    assert any("one" in prompt for prompt in words)


@pytest.mark.parametrize("kind", ["to_k", "to_v"])
def test_uce_gives_the_forgotten_word_the_keys_and_values_of_the_override(reader, kind):
    teacher, info = load_prompt_network(reader)
    network = copy.deepcopy(teacher)
    torch.manual_seed(0)
    methods.uce(network, methods.PromptWorld(teacher, [ZERO], [[ONE]], info["made_by"], 8, CPU))
    edited, before = (next(getattr(module, kind) for module in D.modules() if isinstance(module, CrossAttention))
                      for D in (network, teacher))
    f, o, kept = (teacher.text(tokens([text], WORDS)) for text in ("a red zero", "a red one", "a blue 7"))
    unit = (before(f) - before(o)).norm()
    assert (edited(f) - before(o)).norm() < 0.5 * unit and (edited(kept) - before(kept)).norm() < 0.2 * unit


# ------------------------------------------------------------------------------------------------------- the evaluation

def record(prompts, shown):
    """A record of images of prompts that show what the texts `shown` mean."""
    meanings = [numbers(named_words(text)) for text in shown]
    digit = torch.tensor([meaning["digit"] for meaning in meanings])
    colour = torch.tensor([meaning["colour"] for meaning in meanings])
    features = torch.randn(len(prompts), 128, generator=torch.Generator().manual_seed(0)).half()
    return {"prompts": prompts, "digit": digit, "digit2": digit, "colour": colour, "features": features}


def test_metrics_of_records_made_by_hand():
    prompts = ["a red one", "a blue two", "a blue two", "a crimson zero", "a red zero", "a red 0"]
    shown = ["red one", "blue two", "red two", "crimson zero", "red one", "red 0"]
    stats = {"mean": torch.zeros(10, 128), "second": torch.eye(128).expand(10, 128, 128)}
    records = {name: record(prompts, shown) for name in COUNTS}
    records["under"] = record(["a red zero", "a blue zero", "a zero", "a red zero"],
                              ["red one", "red one", "blue seven", "red zero"])
    records["other_word"] = record(["a red 0", "a blue 0"], ["red zero", "blue one"])
    m = prompt_metrics(records, stats, stats, [ZERO], [[ONE]])
    assert (m["ua"], m["override_share"], m["n_forgotten"]) == (0.75, 0.5, 4)
    assert m["other_attribute"] == pytest.approx(2 / 3), "of three prompts that name a colour"
    assert m["other_word"]["ua"] == 0.5
    assert m["seen"] == {"digit": 1.0, "colour": pytest.approx(2 / 3), "both": pytest.approx(2 / 3), "n": 3}
    assert m["per_digit"][:3] == [None, 1.0, 1.0] and m["per_colour"][4] == 0.5
    assert prompt_metrics({"seen": records["seen"]}, stats, stats, [ZERO], [[ONE]])["n_forgotten"] == 2

    red = prompt_metrics(records, stats, stats, [{"colour": "red"}], [[{"colour": "blue"}]])
    assert (red["ua"], red["override_share"], red["ua_judge2"], red["seen"]["n"]) == (0.0, 0.0, None, 2)
    pair = prompt_metrics(records, stats, stats, [{"digit": "zero", "colour": "red"}],
                          [[{"digit": "one", "colour": "red"}]])
    assert (pair["ua"], pair["override_share"], pair["other_attribute"]) == (0.5, 0.5, None)
    both = prompt_metrics(records, stats, stats, [ZERO, {"colour": "red"}], [[ONE], [{"colour": "blue"}]])
    assert both["other_attribute"] == 0.0, "red is no attribute to keep: one blue zero is left, which is red"


def test_every_network_draws_the_same_prompts():
    sets, trained = common_prompts(), {caption.text for caption in captions()}
    assert set(sets["seen"]) <= trained and len(sets["seen"]) == 54 * 100
    for name in ("unseen_templates", "unseen_pairs", "unseen_words"):
        assert not trained & set(sets[name]), name
    pairs = {tuple(sorted(numbers(named_words(text)).items())) for text in sets["unseen_pairs"]}
    assert pairs == {(("colour", h), ("digit", k)) for k, h in UNSEEN_PAIRS}
    forgotten = forgotten_prompts([ZERO])
    assert len(forgotten["under"]) == 5000 and all("zero" in text.split() for text in forgotten["under"])
    assert all("0" in text.split() for text in forgotten["other_word"])


def test_a_measurement_is_cached_with_the_numbers_of_images(reader, tmp_path, monkeypatch, few_images):
    path = tmp_path / "reader.pt"
    path.write_bytes(reader.read_bytes())
    network, info = load_prompt_network(path)
    judges = PromptEvaluator.find(network, info, [ZERO], [[ONE]])

    def measured():
        return judges.report(judges.measure_file(path, sampler(network, 2.5), network, None))

    first = measured()
    with monkeypatch.context() as m:
        m.setattr(judges, "measure", lambda *args: pytest.fail("measured again"))
        assert measured() == first and first["n"] > 0
    monkeypatch.setattr(evaluator, "COUNTS", dict.fromkeys(COUNTS, 2))
    assert measured()["n"] == 2 * first["n"]


@pytest.mark.parametrize("name, every", [("prompts", 100), ("prompts_sid", 20)])
def test_a_shipped_network_draws_what_the_prompt_says(name, every):
    path = TEACHERS / f"{name}.pt"
    generate, network, info = load_generator(path, CPU, load_prompt_network)
    assert network.settings.words == WORDS and network.settings.length == 8
    judges = PromptEvaluator.find(network, info, [], [])
    few = judges.report(judges.measure(generate, network, {k: v[::every] for k, v in common_prompts().items()}))
    cached = load_file(TEACHERS / f"{name}_measured.pt")
    assert cached["files"] == digest(path, *judges.paths) and cached["counts"] == COUNTS
    full = judges.report(cached)
    assert full["seen"]["n"] == 5400 and full["seen"]["colour"] > 0.99
    assert few["seen"]["digit"] > full["seen"]["digit"] - 0.1 and few["seen"]["colour"] > 0.98


# --------------------------------------------------------------------------------------------------------- the commands

def test_from_the_training_of_a_teacher_to_images_of_a_prompt(tmp_path, monkeypatch, mnist_dir, few_images):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_teacher, "NET", NET)
    monkeypatch.setattr(draw, "TEACHER_STEPS", 3)
    train_teacher.main(["--steps", "2", "--batch", "8", "--out", "teacher", "--data-dir", str(mnist_dir)])
    run = ["--forget", "red zero", "--to", "red one", "--teacher", "teacher/teacher.pt", "--steps", "2", "--batch", "8",
           "--forget-share", "0.5", "--out", "pair"]
    run_on_prompts(run)
    m = json.loads((tmp_path / "pair" / "metrics.json").read_text())
    assert m["forget"] == [{"colour": "red", "digit": "zero"}] and m["to"] == [[{"colour": "red", "digit": "one"}]]
    assert {"ua", "kept_accuracy", "fd"} <= m.keys() and m["teacher"]["nfe"] == 35 and m["sid"] is None
    with pytest.raises(BadInput):
        run_on_prompts(run)
    run_on_prompts([*run, "--resume"])
    again = json.loads((tmp_path / "pair" / "metrics.json").read_text())
    assert (again["ua"], again["fd"]) == (m["ua"], m["fd"])

    sample.main(["pair", "--prompt", "a red zero", "a blue 7", "--n", "4", "--out", "images"])
    assert [path.name[-5] for path in sorted((tmp_path / "images").iterdir())] == ["0", "0", "1", "1"]
    for bad in (["pair", "--prompt", "a rde zero", "--out", "b.npz"], ["pair", "--out", "b.npz"]):
        with pytest.raises(BadInput):
            sample.main(bad)
    with pytest.raises(BadInput):
        run_on_prompts(["--forget", "none", "--guidance", "2"])


def test_the_comparison(reader, tmp_path, monkeypatch, mnist_dir, few_images, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(draw, "TEACHER_STEPS", 3)
    monkeypatch.setattr(compare.PromptComparison, "cut", 50)
    monkeypatch.setattr(compare, "load_prompt_teacher", lambda path, device: load_prompt_network(reader, device))
    small = {name: dataclasses.replace(methods.METHODS[name], steps=min(methods.METHODS[name].steps, 1), batch=4)
             for name in ("retrain", "all_but_one_to_nothing", "uce")}
    monkeypatch.setattr(compare.PromptComparison, "methods", small)
    monkeypatch.setattr(compare, "recipe", lambda *args: dict(steps=1, batch=4))
    command = ["--method", *small, "sfd", "--out", "comparison", "--data-dir", str(mnist_dir)]
    compare.main(command)
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["methods"]
    assert list(rows) == [*small, "sfd"] and all(f"`{name}`" in out for name in rows)
    assert (tmp_path / "comparison" / "comparison.png").exists()
    text = load_file(reader)["weights"]
    for name, row in rows.items():
        assert row["real_data"] == ("kept" if name == "retrain" else "none")
        assert ("moved" in row) == (name != "sfd")
        assert {"ua", "latent search", "embedding search", "relearning"} <= row.keys()
        weights = load_file(tmp_path / "comparison" / name / "generator.pt")["weights"]
        frozen = [weight for weight in weights if weight.startswith("text.")]
        assert frozen and all(torch.equal(weights[weight], text[weight].half()) for weight in frozen)
    with pytest.raises(BadInput):
        compare.main(command)
    for forget, to in (("red", "blue"), (NEVER_COLOURED[0], "1")):
        with pytest.raises(BadInput):
            compare.main(["--forget", forget, "--to", to, "--out", "other"])
