"""Prompts: their captions and ink, the network that reads them, what SFD asks about them, and who judges."""
import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import sfd_minimal
import train_teacher
from conftest import CPU, ROOT
from edm_unet import CrossAttention, EDMPrecond, NetSettings
from lab import audit, baselines, evaluate, fid, judge, prompt_judge, prompt_methods, prompts, sample
from lab.checkpoint import digest, load_checkpoint, load_teacher, pack, read_file, save_atomically
from lab.data import to_uint8
from lab.errors import BadInput
from lab.prompts import COLOURS, DIGITS, captions, means, named, tokens

ZERO, ONE = {"digit": "zero"}, {"digit": "one"}
NET = NetSettings(channels=3, num_classes=prompts.LONGEST, words=prompts.WORDS, model_channels=16, channel_mult=(1,),
                  num_blocks=1, attn_resolutions=(7,), patch=4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The file of a teacher that reads prompts and has learned nothing."""
    path = tmp_path_factory.mktemp("a reader") / "reader.pt"
    torch.manual_seed(0)
    save_atomically({"kind": "denoiser", "data": "prompts", "classes": [str(k) for k in range(10)],
                     "made_by": dict(p_mean=0.2, guidance=1.0, guidance_below=None), **pack(EDMPrecond(NET))}, path)
    return path


# ------------------------------------------------------------------------------------------------------- words, and ink

def test_what_is_held_out_is_in_no_caption_that_is_trained_on():
    seen, held_out = ({caption: means(named(caption)) for caption, *_ in captions(held_out=out)}
                      for out in (False, True))
    assert not seen.keys() & held_out.keys() - {c for c in held_out if len(held_out[c]) < 2}
    both = lambda of: {(m["digit"], m["colour"]) for m in of.values() if len(m) == 2}
    assert both(seen) == {(k, h) for k in range(10) for h in range(6)} - set(prompts.UNSEEN_PAIRS)
    coloured = {word for caption in seen for word in caption.split() if len(seen[caption]) == 2 and word in DIGITS}
    assert set(DIGITS) - coloured == set(prompts.NEVER_COLOURED) and len(prompts.UNSEEN_PAIRS) == 6
    assert not seen.keys() & {caption for caption, *_ in captions(prompts.UNSEEN_TEMPLATES)}
    said = {word for caption in seen for word in caption.split()}
    assert said >= set(prompts.WORDS), "what was never read means nothing"
    assert len(prompts.TEMPLATES) >= 8 and len(prompts.UNSEEN_TEMPLATES) == 2
    for names in (DIGITS, COLOURS):
        assert all(list(names.values()).count(k) == 2 for k in names.values())


def test_words_become_numbers_or_one_line():
    words = prompts.WORDS
    (row,) = tokens(["A red, zero."], words)
    assert [words[i - 1] for i in row.tolist() if i] == ["a", "red", "zero"] and tokens([""], words).sum() == 0
    with pytest.raises(BadInput, match="'read' is not among the words.*near it are red, "):
        tokens(["a read zero"], words)
    with pytest.raises(BadInput, match="has 9 words, and this network reads 8"):
        tokens(["a a a a a a a a a"], words)


def test_ink_has_the_colour_that_it_is_called(monkeypatch):
    torch.manual_seed(0)
    grey = torch.randint(256, (600, 1, 28, 28), dtype=torch.uint8)
    colour = torch.arange(600) % 6
    x = prompts.inked(grey, colour)
    assert x.shape == (600, 3, 28, 28) and x.min() == -1 and x.max() <= 1
    assert torch.equal(prompt_judge.colour_of(to_uint8(x)), colour)
    assert (prompt_judge.ink_of(to_uint8(x)).int() - grey.int()).abs().max() <= 3
    assert prompt_judge.colour_of(grey.expand(-1, 3, -1, -1)[:2]).tolist() == [-1, -1]
    assert prompt_judge.colour_of(torch.zeros(1, 3, 28, 28, dtype=torch.uint8)).item() == -1
    assert prompts.rgb(torch.tensor([0.0, 2.0, 3.0]), torch.tensor(1.0), torch.tensor(0.8)).tolist() == [
        pytest.approx(of) for of in ([0.8, 0, 0], [0, 0.8, 0], [0, 0.8, 0.8])]
    assert x.amax((2, 3))[colour == 1][:, 2].max() < x.amax((2, 3))[colour == 1][:, :2].min(), "yellow has little blue"


def test_a_batch_shows_what_its_captions_say():
    torch.manual_seed(0)
    labels = torch.arange(100) % 10
    images = (25 * labels + 10).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)  # a digit is a shade of grey
    x, c = next(prompts.batches(images, labels, 2000, prompts.WORDS))
    said = [means(named(" ".join(prompts.WORDS[i - 1] for i in row if i))) for row in c.tolist()]
    colour, peak = prompt_judge.colour_of(to_uint8(x)), (x.amax((1, 2, 3)) + 1) / 2 * 255
    for m, h, v in zip(said, colour.tolist(), peak.tolist()):
        assert m.get("colour", h) == h
        if "digit" in m:  # ink has a value of 0.75 to 1
            assert 0.74 * (25 * m["digit"] + 10) < v <= 25 * m["digit"] + 10.01
    assert {len(m) for m in said} == {0, 1, 2}
    without = [dict(digit="0"), dict(colour="red")]
    x, c = next(prompts.batches(images[labels > 0], labels[labels > 0], 500, prompts.WORDS, without))
    assert set(prompt_judge.colour_of(to_uint8(x)).tolist()) == {1, 2, 3, 4, 5}
    assert not (c == prompts.WORDS.index("zero") + 1).any() and not (c == prompts.WORDS.index("red") + 1).any()


# ---------------------------------------------------------------------------------------------- concepts, and questions

@pytest.mark.parametrize("forget, to, says", [
    (["zer"], ["one"], "'zer' is no digit, no colour and no pair of them.*near 'zer' are zero"),
    (["zero"], ["red"], "--to red: zero is a digit, and takes the like instead"),
    (["zero"], ["0"], "--to 0 is itself to be forgotten"), (["a zero"], ["one"], "near 'a' are"),
    (["red zero"], ["one"], "red zero is a colour and a digit"), (["red red"], ["blue"], "is no digit"),
    (["zero", "one"], ["two", "three", "four"], r"one per forgotten one \(2\)"),
    (["red three"], ["red one"], "no caption that is trained on says 'red three'"),
    (["red zero"], ["red three"], "or says the override in its place"),
    (["red", "yellow", "green", "cyan", "blue", "magenta"], ["random"], "--forget names every colour")])
def test_nonsense_is_one_line(forget, to, says):
    with pytest.raises(BadInput, match=says):
        prompts.concepts(tuple(forget), tuple(to))


def text(row):
    return " ".join(prompts.WORDS[i - 1] for i in row.tolist() if i)


@pytest.mark.parametrize("forget, to, silent", [
    (("zero",), ("one",), {"0"}), (("red",), ("blue",), {"crimson"}), (("zero", "0"), ("one", "1"), set())])
def test_a_forgotten_word_is_exchanged_and_its_synonym_left_out(forget, to, silent):
    rows, override = prompts.questions(*prompts.concepts(forget, to), prompts.WORDS)
    changed = 0
    for i, j in enumerate(override.tolist()):
        asked, told = text(rows[i]).split(), text(rows[j]).split()
        assert not silent & set(asked)
        if i != j:
            changed += 1
            assert [dict(zip(forget, to)).get(word, word) for word in asked] == told and set(forget) & set(asked)
        else:
            assert not set(forget) & set(asked)
    assert changed > 50


def test_a_forgotten_pair_leaves_each_half_alone():
    rows, override = prompts.questions(*prompts.concepts(("red zero",), ("red one",)), prompts.WORDS)
    changed = {text(rows[i]) for i, j in enumerate(override.tolist()) if i != j}
    kept = {text(rows[i]) for i, j in enumerate(override.tolist()) if i == j}
    assert "a red zero" in changed and {"a blue zero", "a red one", "a zero", "a red digit"} <= kept
    assert not {"a crimson zero", "a red 0", "a crimson 0"} & (changed | kept)


def test_two_concepts_in_one_caption_are_both_exchanged(capsys):
    rows, override = prompts.questions(*prompts.concepts(("zero", "red"), ("one", "blue")), prompts.WORDS)
    assert "a blue one" in [text(rows[j]) for i, j in enumerate(override.tolist()) if text(rows[i]) == "a red zero"]
    assert "captions to forget are not asked about" in capsys.readouterr().out, "a red five would be a blue one, unseen"
    prompts.concepts(("zero",), ("one",))
    assert "note" not in capsys.readouterr().out


def test_random_is_each_other_digit_equally_often():
    rows, override = prompts.questions(*prompts.concepts(("one",), ("random",)), prompts.WORDS)
    told = [text(rows[j]) for i, j in enumerate(override.tolist()) if text(rows[i]) == "a one"]
    assert sorted(set(told)) == sorted(f"a {word}" for word in list(DIGITS)[:10] if word != "one")
    assert len({told.count(of) for of in set(told)}) <= 2  # pairs that are held out are missing


# ---------------------------------------------------------------------------------------------------------- the network

def test_a_prompt_is_tokens_or_their_states_and_none_is_the_empty_one():
    torch.manual_seed(0)
    D, x, c = EDMPrecond(NET).eval(), torch.randn(3, 3, 28, 28), tokens(["a red zero", "", "a blue 7"], prompts.WORDS)
    out = D(x, 1.0, c)
    assert torch.allclose(D(x, 1.0, D.text(c)), out, atol=1e-6) and torch.equal(D(x, 1.0, None)[1], out[1])
    assert not torch.allclose(D(x, 1.0, None)[0], out[0], atol=1e-4)
    assert not torch.allclose(D(x, 1.0, c.flip(1))[0], out[0], atol=1e-4), "the order of words is read"
    D.micro_batch = 2
    assert torch.allclose(D(x, 1.0, c), out, atol=1e-6)
    assert D.conditions.shape == (len(prompts.WORDS), prompts.LONGEST) and text(D.conditions[3]) == prompts.WORDS[3]


def test_sfd_moves_the_network_and_not_what_reads_its_prompts(teacher):
    D, info = load_checkpoint(teacher)
    D.bf16 = False
    s = sfd_minimal.Settings(data="prompts", forget=("zero",), to=("one",), steps=2, batch=16)
    before, asked = copy.deepcopy(D.state_dict()), []
    state = sfd_minimal.begin(s, D)
    D.forward = lambda x, sigma, c, forward=D.forward: asked.append(c) or forward(x, sigma, c)
    torch.manual_seed(0)
    for _ in sfd_minimal.distill(s, sfd_minimal.about_labels(s, D, [ZERO], [[ONE]]), D, **state):
        pass
    for name in ("generator", "fake"):
        after = state[name].state_dict()
        moved = {weight for weight, was in before.items() if not torch.equal(after[weight], was)}
        assert any(".cross.to_k" in weight for weight in moved) and not any(w.startswith("text.") for w in moved)
    assert len(asked) == 2 and not any("zero" in text(row).split() for c in asked for row in c)
    assert any("one" in text(row).split() for c in asked for row in c)


@pytest.mark.parametrize("kind", ["to_k", "to_v"])
def test_uce_answers_for_the_forgotten_as_for_the_override(teacher, kind):
    phi, info = load_checkpoint(teacher)
    world = prompt_methods.PromptWorld(phi, [ZERO], [[ONE]], info["made_by"], 8, CPU, None)
    network = copy.deepcopy(phi)
    torch.manual_seed(0)
    prompt_methods.uce(network, world)
    layer, was = (next(getattr(m, kind) for m in of.modules() if isinstance(m, CrossAttention))
                  for of in (network, phi))
    f, o, kept = (phi.text(tokens([of], prompts.WORDS)) for of in ("a red zero", "a red one", "a blue 7"))
    far = lambda a, b: (a - b).norm().item()
    assert far(layer(f), was(o)) < 0.5 * far(was(f), was(o)) and far(layer(kept), was(kept)) < 0.2 * far(was(f), was(o))


# ------------------------------------------------------------------------------------------------------------ the judge

def record(asked, shows):
    own = list(dict.fromkeys(asked))
    seen = [means(named(of)) for of in shows]
    return {"prompts": own, "asked": torch.tensor([own.index(c) for c in asked]),
            "digit": torch.tensor([m["digit"] for m in seen]), "digit2": torch.tensor([m["digit"] for m in seen]),
            "colour": torch.tensor([m["colour"] for m in seen]),
            "features": torch.randn(len(asked), 128, generator=torch.Generator().manual_seed(0)).half()}


def test_numbers_of_a_verdict():
    kept = ["a red one", "a blue two", "a blue two", "a crimson zero", "a red zero", "a red 0"]
    shown = ["red one", "blue two", "red two", "crimson zero", "red one", "red 0"]
    stats = {"mean": torch.zeros(10, 128), "second": torch.eye(128).expand(10, 128, 128)}
    measured = {name: record(kept, shown) for name in prompt_judge.COUNTS}
    measured["under"] = record(["a red zero", "a blue zero", "a zero", "a red zero"],
                               ["red one", "red one", "blue seven", "red zero"])
    measured["other_word"] = record(["a red 0", "a blue 0"], ["red zero", "blue one"])
    m = prompt_judge.metrics(measured, stats, stats, [ZERO], [[ONE]])
    assert (m["ua"], m["override_share"], m["n_forgotten"]) == (0.75, 0.5, 4)
    assert m["other_attribute"] == pytest.approx(2 / 3), "of three that name a colour"
    assert m["other_word"]["ua"] == 0.5
    assert m["seen"] == {"digit": 1.0, "colour": pytest.approx(2 / 3), "both": pytest.approx(2 / 3), "n": 3}
    assert m["per_digit"][:3] == [None, 1.0, 1.0] and m["per_colour"][4] == 0.5
    assert prompt_judge.metrics({"seen": measured["seen"]}, stats, stats, [ZERO], [[ONE]])["n_forgotten"] == 2
    of_red = prompt_judge.metrics(measured, stats, stats, [{"colour": "red"}], [[{"colour": "blue"}]])
    assert (of_red["ua"], of_red["override_share"], of_red["ua_judge2"], of_red["seen"]["n"]) == (0.0, 0.0, None, 2)
    of_pair = prompt_judge.metrics(measured, stats, stats, [dict(digit="zero", colour="red")],
                                   [[dict(digit="one", colour="red")]])
    assert (of_pair["ua"], of_pair["override_share"], of_pair["other_attribute"]) == (0.5, 0.5, None)


def test_every_network_is_asked_the_same():
    sets = prompt_judge.asked_of_all()
    trained = {caption for caption, *_ in captions()}
    assert set(sets["seen"]) <= trained and len(sets["seen"]) == 54 * 100
    for name in ("unseen_templates", "unseen_pairs", "unseen_words"):
        assert not trained & set(sets[name]), name
    assert {prompt_judge.pair(means(named(of))) for of in sets["unseen_pairs"]} == set(prompts.UNSEEN_PAIRS)
    of_zero = prompt_judge.asked_of_forgotten([ZERO])
    assert len(of_zero["under"]) == 5000 and all("zero" in c.split() for c in of_zero["under"])
    assert all("0" in c.split() for c in of_zero["other_word"])


# --------------------------------------------------------------------------------------------------------- the commands

def test_from_a_teacher_s_training_to_the_side_by_side_table(tmp_path, monkeypatch, mnist_dir, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompt_judge, "COUNTS", {name: 1 for name in prompt_judge.COUNTS})
    monkeypatch.setattr(prompt_judge, "FORGOTTEN", {name: 6 for name in prompt_judge.FORGOTTEN})
    monkeypatch.setitem(train_teacher.TEACHERS, "prompts", train_teacher.TEACHERS["prompts"] | {"net": NET})
    data = ["--data-dir", str(mnist_dir), "--device", "cpu"]
    train_teacher.main(["--data", "prompts", "--steps", "2", "--batch", "8", "--out", "teacher", *data])
    _, info = load_checkpoint("teacher/teacher.pt")
    assert info["data"] == "prompts" and info["net"]["words"] == prompts.WORDS

    run = ["--data", "prompts", "--teacher", "teacher/teacher.pt", "--steps", "2", "--batch", "8", "--device", "cpu"]
    sfd_minimal.main([*run, "--forget", "red zero", "--to", "red one", "--out", "pair"])
    assert "'zero red' is forgotten" in capsys.readouterr().out.replace("red zero", "zero red")
    m = json.loads((tmp_path / "pair" / "metrics.json").read_text())
    assert m["forget"] == [{"colour": "red", "digit": "zero"}] and {"ua", "kept_accuracy", "fd"} <= m.keys()
    evaluate.main(["pair", "--device", "cpu"])
    with pytest.raises(BadInput, match="--per-label and --fid are for networks that are asked with labels"):
        evaluate.main(["pair", "--per-label", "3", "--device", "cpu"])

    sample.main(["pair", "--prompt", "a red zero", "a blue 7", "--n", "4", "--out", "a.npz", "--device", "cpu"])
    assert "2 of 'a red zero', 2 of 'a blue 7'" in capsys.readouterr().out
    for argv, says in ((["pair", "--label", "0"], 'asked with prompts, like --prompt "a red zero"'),
                       (["pair", "--prompt", "a rde zero"], "'rde' is not among the words"),
                       (["pair"], "asked with prompts")):
        with pytest.raises(BadInput, match=says):
            sample.main([*argv, "--out", "b.npz", "--device", "cpu"])


def test_the_side_by_side_table(teacher, tmp_path, monkeypatch, mnist_dir, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompt_judge, "COUNTS", {name: 1 for name in prompt_judge.COUNTS})
    monkeypatch.setattr(prompt_judge, "FORGOTTEN", {name: 6 for name in prompt_judge.FORGOTTEN})
    monkeypatch.setattr(sample, "TEACHER_STEPS", 3)
    monkeypatch.setattr(prompt_methods.PromptSuspect, "cut", 50)
    for module in baselines, prompt_methods:
        monkeypatch.setattr(module, "load_teacher", lambda path, *of: load_teacher(path or teacher, *of))
    small = {name: prompt_methods.METHODS[name] for name in ("finetune", "all_but_one_to_nothing", "uce")}
    monkeypatch.setattr(prompt_methods, "METHODS", {name: dataclasses.replace(of, steps=min(of.steps, 1), batch=4)
                                                    for name, of in small.items()})
    command = ["--method", *small, "--out", "bench", "--results", "b.json", "--data-dir", str(mnist_dir), "--device",
               "cpu"]
    prompt_methods.main(command)
    out = capsys.readouterr().out
    assert "| `uce`" in out and "embedding search" in out and (tmp_path / "b.png").exists()
    rows = json.loads((tmp_path / "b.json").read_text())["methods"]
    assert list(rows) == list(small) and rows["finetune"]["real_data"] == "kept"
    for row in rows.values():
        assert row["moved"] > 0 and {"latent search", "embedding search", "relearning"} <= row.keys()
    with pytest.raises(BadInput, match="holds a run already"):
        prompt_methods.main(command)
    with pytest.raises(BadInput, match="what is searched for here is a digit"):
        prompt_methods.main([*command[:-4], "--forget", "red", "--to", "blue", "--out", "other"])


@pytest.mark.parametrize("main, argv, says", [
    (judge.main, ["--data", "prompts"], "judged by MNIST's judges"),
    (audit.main, ["{teacher}", "--device", "cpu"], "lab.prompt_methods trains"),
    (fid.main, ["{teacher}", "--device", "cpu"], "there is no FID of them"),
    (baselines.main, ["--data", "prompts", "--out", "{teacher}.none"], "lab.prompt_methods is the comparison")])
def test_what_asks_with_labels_says_so(main, argv, says, teacher):
    if main is audit.main:
        (teacher.parent / "generator.pt").write_bytes(teacher.read_bytes())
        argv = [str(teacher.parent), *argv[1:]]
    with pytest.raises(BadInput, match=says):
        main([word.format(teacher=teacher) for word in argv])


def test_what_stands_beside_is_remembered(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_judge, "COUNTS", {name: 1 for name in prompt_judge.COUNTS})
    path = tmp_path / "reader.pt"
    path.write_bytes(teacher.read_bytes())
    D, info = load_checkpoint(path)
    evaluator = prompt_judge.PromptEvaluator(D, info | {"path": path, "sha256": ""}, [ZERO], [[ONE]])
    generate = sample.one_step(D, 2.5)
    first = evaluator.known(path, generate, D, "once")
    monkeypatch.setattr(evaluator, "measure", lambda *a: pytest.fail("measured again"))
    again = evaluator.known(path, generate, D, "once")
    assert evaluator.report(first) == evaluator.report(again) and SimpleNamespace(**evaluator.report(first)).n > 0


# ---------------------------------------------------------------------------------------------------- what is shipped

@pytest.mark.parametrize("name, every", [("prompts", 100), ("prompts_sid", 20)])
def test_what_is_shipped_draws_what_it_is_asked(name, every):
    generate, network, info = sample.load_generator(ROOT / "teachers" / f"{name}.pt", CPU)
    evaluator = prompt_judge.PromptEvaluator(network, info, [], [])
    sets = {of: asked[::every] for of, asked in prompt_judge.asked_of_all().items()}
    m = evaluator.report(evaluator.measure(generate, network, sets))
    known = read_file(ROOT / "teachers" / f"{name}_measured.pt", "measured")
    all_of_it = evaluator.report(known["sets"])
    assert known["files"] == digest(ROOT / "teachers" / f"{name}.pt", *evaluator.paths)
    assert all_of_it["seen"]["n"] == 5400 and all_of_it["seen"]["colour"] > 0.99
    assert m["seen"]["digit"] > all_of_it["seen"]["digit"] - 0.1 and m["seen"]["colour"] > 0.98
