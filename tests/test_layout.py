"""What an erased network keeps of the teacher's images is measured: place, width and colour of the ink."""
import dataclasses
import itertools
from functools import partial

import pytest
import torch

from edm_unet import BadInput, load_file, pack, save_file
from lab.core.tables import read_json
from lab.evaluate import draw
from lab.prompts import compare, evaluator, layout, methods
from lab.prompts.captions import FIRST_DIGITS
from lab.prompts.network import PromptDenoiser, PromptSettings, load_prompt_network

NET = PromptSettings(channels=3, model_channels=16, channel_mult=(1,), num_blocks=1, patch=4)
RED, GREEN = (255, 0, 0), (0, 255, 0)


def picture(pixels, ink=RED):
    """An image uint8 (1, 3, 28, 28) of inked pixels (28, 28)."""
    return (pixels * torch.tensor(ink).view(3, 1, 1)).to(torch.uint8)[None]


def disc(row, column, radius=5):
    rows, columns = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius ** 2


def stroke(width):
    """A vertical stroke, 20 pixels long."""
    pixels = torch.zeros(28, 28, dtype=torch.bool)
    pixels[4:24, 10:10 + width] = True
    return pixels


# -------------------------------------------------------------------------------------------------------- the measures

def test_the_same_image_has_overlap_one_and_no_differences():
    image = torch.cat([picture(disc(10, 12)), picture(stroke(3), GREEN)])
    assert layout.compare_images(image, image) == {"overlap": 1, "centroid": 0, "width": 0, "colour": 1}
    assert layout.drift(image, image) == 0


def test_a_disc_moved_by_three_pixels_has_its_centroid_three_pixels_away():
    image = picture(disc(10, 12))
    for row, column in ((13, 12), (10, 9)):
        moved = layout.compare_images(image, picture(disc(row, column)))
        assert moved["centroid"] == pytest.approx(3) and moved["width"] == 0 and moved["colour"] == 1
        common, either = (disc(10, 12) & disc(row, column)).sum(), (disc(10, 12) | disc(row, column)).sum()
        assert moved["overlap"] == pytest.approx((common / either).item()) and 0 < moved["overlap"] < 1
    assert layout.compare_images(image, picture(disc(13, 16)))["centroid"] == pytest.approx(5)


def test_discs_that_do_not_touch_have_no_overlap():
    assert layout.compare_images(picture(disc(6, 6)), picture(disc(20, 20)))["overlap"] == 0


def test_a_thicker_stroke_is_wider():
    narrow, wide = layout.stroke_width(torch.stack([stroke(2), stroke(5)])).tolist()
    assert narrow == pytest.approx(2 * 40 / 44) and wide == pytest.approx(2 * 100 / 50)
    for a, b in ((2, 5), (5, 2)):
        assert layout.compare_images(picture(stroke(a)), picture(stroke(b)))["width"] == pytest.approx(wide - narrow)


def test_a_stroke_at_the_edge_of_an_image_has_the_same_width():
    pixels = stroke(4)
    assert torch.equal(layout.stroke_width(pixels[None]), layout.stroke_width(pixels.roll(-10, 1)[None]))


def test_a_red_and_a_green_disc_differ_in_colour_alone():
    red, green = picture(disc(10, 12)), picture(disc(10, 12), GREEN)
    assert layout.compare_images(red, green) == {"overlap": 1, "centroid": 0, "width": 0, "colour": 0}
    both = layout.compare_images(torch.cat([red, red]), torch.cat([red, green]))
    assert both["colour"] == 0.5


def test_ink_is_what_is_brighter_than_half_of_the_brightest():
    image = picture(disc(10, 12), (100, 0, 0)) + picture(disc(20, 20, 2), (40, 0, 0))
    assert torch.equal(layout.inked_pixels(image)[0], disc(10, 12))


def test_an_image_without_ink_has_numbers_too():
    black = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    numbers = layout.compare_images(black, picture(disc(3, 4, 3)))
    assert numbers["overlap"] == 0 and numbers["centroid"] == pytest.approx(5) and numbers["width"] > 0


def test_drift_is_over_pixels_from_minus_one_to_one():
    black = torch.zeros(4, 3, 28, 28, dtype=torch.uint8)
    assert layout.drift(black, black + 255) == pytest.approx(2)


# --------------------------------------------------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def measured(tmp_path_factory, mnist_dir):
    """A function of options that runs the command on tiny networks in a folder, and the folder."""
    folder = tmp_path_factory.mktemp("layout")
    torch.manual_seed(0)
    save_file(folder / "reader.pt", {"data": "prompts", "classes": FIRST_DIGITS,
                                     "made_by": dict(p_mean=0.2, guidance=1.0), **pack(PromptDenoiser(NET))})
    few_paths, small = partial(methods.record_paths, n=4), {}
    for name, method in methods.METHODS.items():
        before = few_paths if method.before is methods.record_paths else method.before
        small[name] = dataclasses.replace(method, steps=min(method.steps, 1), batch=4, before=before)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        m.setattr(methods, "record_paths", few_paths)  # of record_paths_to_nothing
        m.setattr(draw, "TEACHER_STEPS", 2)
        m.setattr(evaluator, "COUNTS", dict.fromkeys(evaluator.COUNTS, 1))
        m.setattr(evaluator, "FORGOTTEN", dict.fromkeys(evaluator.FORGOTTEN, 6))
        m.setattr(compare, "load_prompt_teacher", lambda path, device: load_prompt_network("reader.pt", device))
        m.setattr(layout.LayoutComparison, "methods", small)
        m.setattr(layout, "UNPROMPTED", 3)
        m.setattr(layout, "TRIED", (dict(lr=1e-9, steps=1), dict(lr=0.3, steps=2)))
        yield lambda *words: layout.main([*words, "--images", "4", "--data-dir", str(mnist_dir)]), folder


def rows_of(folder, out):
    """{(forgotten, name of the row): its runs}, and all results."""
    results = read_json(folder / out / "layout.json")
    return {(case["forget"], name): runs for case in results["cases"] for name, runs in case["rows"].items()}, results


@pytest.mark.slow
def test_the_layout_of_every_method_is_measured_for_each_seed(measured, capsys):
    command, folder = measured
    command("--seeds", "0", "1", "--out", "all")
    printed = capsys.readouterr().out
    rows, results = rows_of(folder, "all")
    assert layout.table(results) in printed
    of_methods = {(forget, name) for forget, _, names in layout.CASES for name in names}
    assert of_methods <= rows.keys() and ("red zero", "all_but_one") in of_methods
    for forget, name in rows:
        assert f"{forget} to" in printed and name in printed
    for key in of_methods:
        runs = rows[key]
        assert len(runs) == (1 if key[1] == "retrain" else 2)
        for run in runs:
            assert {"ua", "kept_accuracy", "unseen_pairs"} <= run["judge2"].keys() and run["drift"] >= 0
            assert run["layout"].keys() == run["layout_other_noise"].keys() == {"overlap", "centroid", "width",
                                                                                "colour"}
    teacher = rows["zero", "teacher"][0]
    assert teacher["layout"] == {"overlap": 1, "centroid": 0, "width": 0, "colour": 1} and teacher["drift"] == 0
    assert teacher["layout_other_noise"] == rows["zero", "teacher, other noise"][0]["layout"]
    assert teacher["layout_other_noise"]["overlap"] < 1
    assert rows["zero", "uce"][0]["drift"] < rows["zero", "retrain"][0]["drift"]
    seeds = [load_file(folder / "all" / f"zero-seed{k}" / "all_but_one" / "generator.pt")["weights"] for k in (0, 1)]
    assert any(not torch.equal(seeds[0][name], seeds[1][name]) for name in seeds[0]), "training differs"


@pytest.mark.slow
def test_a_run_goes_on_with_what_is_not_finished(measured):
    command, folder = measured
    options = ["--method", "uce", "--seeds", "0", "--out", "parts"]
    command(*options)
    before, _ = rows_of(folder, "parts")
    path = folder / "parts" / "zero-seed0" / "uce" / "generator.pt"
    written = path.stat().st_mtime_ns
    with pytest.raises(BadInput):
        command(*options)
    command(*options, "--resume", "--method", "uce", "esd_cross")
    after, _ = rows_of(folder, "parts")
    assert path.stat().st_mtime_ns == written
    assert after["zero", "uce"] == before["zero", "uce"] and ("zero", "esd_cross") in after


@pytest.mark.slow
def test_settings_are_chosen_by_the_first_judge_at_another_seed_and_noise(measured, monkeypatch):
    command, folder = measured
    seen, seeds, run_method = [], [], layout.run_method

    def best(rows):
        seen.append(rows)
        return rows[1]

    def noted(comparison, name, change):
        seeds.append((name, comparison.s.seed, comparison.evaluator.seed))
        return run_method(comparison, name, change)

    monkeypatch.setattr(layout, "run_method", noted)
    reading = itertools.cycle([0, 9])  # the first judge reads a zero, the second a nine
    monkeypatch.setattr(layout, "read_digits", lambda judge, images: (torch.full((len(images),), next(reading)), None))
    monkeypatch.setattr(layout, "best", best)
    command("--tune", "--method", "esd_cross", "uce", "--seeds", "0", "--out", "tuned")
    (tried,) = seen
    assert seeds == [("esd_cross", 100, 2000)] * 2 + [("uce", 0, 1000), ("esd_cross", 0, 1000), ("uce", 0, 1000)]
    rows, results = rows_of(folder, "tuned")
    assert results["tuned"] == {"esd_cross": layout.TRIED[1]}
    (run,) = rows["zero", "esd_cross"]
    assert run["seed"] == 0 and layout.TRIED[1].items() <= run["settings"].items()
    assert (tried[1]["ua"], run["judge2"]["ua"]) == (0, 1)


@pytest.mark.slow
def test_a_one_step_generator_is_compared_and_another_file_refused(measured):
    command, folder = measured
    reader = load_file(folder / "reader.pt")
    for name, forget in (("sfd", [{"digit": "zero"}]), ("other", [{"digit": "one"}])):
        save_file(folder / f"{name}.pt", {**reader, "sigma_init": 2.5, "forget": forget})
    command("--method", "uce", "--seeds", "0", "--out", "one-step", "--sfd", "sfd.pt", "sfd.pt")
    rows, _ = rows_of(folder, "one-step")
    assert len(rows["zero", "sfd"]) == 2 and ("red zero", "sfd") not in rows
    for bad in ("other.pt", "reader.pt"):
        with pytest.raises(BadInput, match="no one-step generator"):
            command("--method", "uce", "--seeds", "0", "--out", f"bad-{bad}", "--sfd", bad)


@pytest.mark.parametrize("words", [["--seeds", "x"], ["--control", "1.5"], ["--images", "0"]])
def test_bad_options_are_one_line(measured, words, tmp_path):
    with pytest.raises(BadInput) as e:
        layout.main([*words, "--out", str(tmp_path / "new")])
    assert "\n" not in str(e.value)
    assert not (tmp_path / "new").exists()


def test_a_table_has_the_mean_and_range_of_the_runs():
    runs = [{"judge2": {"ua": ua}, "layout": {"overlap": 0.5}} for ua in (0.9, 1.0)]
    text = layout.table({"cases": [{"forget": "zero", "to": "one", "rows": {"uce": runs}}]})
    assert "95.0% (90.0% to 100.0%)" in text and "| 0.50 " in text and "zero to one: uce" in text
