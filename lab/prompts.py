"""Prompts: captions of MNIST's digits in coloured ink, as a text-to-image model's data in miniature.

A caption is a template with words for a digit and a colour in it, or for one of them, or for neither. Of all captions,
some are held out of every training: two templates, six pairs of colour and digit, and two numerals beside a colour,
which are seen alone. A concept to forget is one or two such words, as in "zero", "red" or "red zero".
"""
import difflib
import itertools

import torch

from lab.errors import BadInput

DIGITS = dict(zip("zero one two three four five six seven eight nine".split(), range(10)))
DIGITS |= {str(k): k for k in range(10)}
COLOURS = dict(zip("red yellow green cyan blue magenta".split(), range(6)))  # number k has the hue 60 k degrees
COLOURS |= dict(zip("crimson golden emerald turquoise azure fuchsia".split(), range(6)))
TEMPLATES = ("a {colour} {digit}", "the digit {digit} in {colour}", "a {digit} drawn with {colour} ink",
             "a picture of a {colour} {digit}", "handwritten {digit} in {colour}", "a {digit}", "the digit {digit}",
             "a picture of a {digit}", "a {colour} digit", "something drawn with {colour} ink", "a handwritten digit")
UNSEEN_TEMPLATES = ("the {colour} digit {digit}", "{digit} in {colour} ink")
UNSEEN_PAIRS = ((3, 0), (6, 1), (4, 2), (7, 3), (5, 4), (8, 5))  # digit and colour, no image of which is trained on
NEVER_COLOURED = ("2", "9")                                       # in no caption that names a colour
KINDS = {"digit": DIGITS, "colour": COLOURS}
WORDS = tuple(dict.fromkeys(" ".join(TEMPLATES + UNSEEN_TEMPLATES).format(digit="", colour="").split()))
WORDS += (*DIGITS, *COLOURS)
LONGEST = 8  # words of a prompt


# --------------------------------------------------------------------------------------------------- text, and its ink

def tokens(prompts, words):
    """(N, LONGEST) int64: the place of each word in `words`, counted from 1, then zeros. BadInput for a word that is
    not among them, and for a prompt that is too long."""
    place, rows = {word: i for i, word in enumerate(words, 1)}, []
    for prompt in prompts:
        said = [word.strip(".,;:!?") for word in prompt.lower().split()]
        said = [word for word in said if word]
        for word in said:
            if word not in place:
                near = difflib.get_close_matches(word, words, 5, 0.0)
                raise BadInput(f"{prompt!r}: {word!r} is not among the words of this network; near it are "
                               f"{', '.join(near)}")
        if len(said) > LONGEST:
            raise BadInput(f"{prompt!r} has {len(said)} words, and this network reads {LONGEST}")
        rows.append([place[word] for word in said] + [0] * (LONGEST - len(said)))
    return torch.tensor(rows)


def rgb(hue, saturation, value):
    """(..., 3) in [0, 1] of a hue in sixths of the circle, a saturation and a value, each (...)."""
    k = (hue[..., None] + torch.tensor([5.0, 3.0, 1.0], device=hue.device)) % 6
    value = value[..., None]
    return value - value * saturation[..., None] * torch.minimum(k, 4 - k).clamp(0, 1)


def inked(images, colour):
    """Grey images uint8 (B, 1, H, W) in ink of a colour (B,), on black, in [-1, 1]: (B, 3, H, W). The hue lies within
    10 degrees of the colour's, saturation and value in [0.75, 1]."""
    u = torch.rand(3, len(colour), device=images.device)
    ink = rgb(colour + (2 * u[0] - 1) / 6, 0.75 + u[1] / 4, 0.75 + u[2] / 4)
    return images.float() / 255 * ink[:, :, None, None] * 2 - 1


# ------------------------------------------------------------------------------------------------------------ captions

def captions(templates=TEMPLATES, held_out=False):
    """[(caption, digit, colour)], words: each template with each pair of words, named in it or not, so that templates
    are about equally often there; without what is held out of training, or that alone."""
    found = []
    for template, digit, colour in itertools.product(templates, DIGITS, COLOURS):
        caption = template.format(digit=digit, colour=colour)
        unseen = (DIGITS[digit], COLOURS[colour]) in UNSEEN_PAIRS or (
            digit in NEVER_COLOURED and {"digit", "colour"} == named(caption).keys())
        if unseen == held_out:
            found.append((caption, digit, colour))
    return found


def named(text):
    """{"digit": word, "colour": word}: those of a text's words that name one."""
    return {kind: word for word in text.lower().split() for kind, known in KINDS.items() if word in known}


def means(words):
    """{"digit": number, "colour": number} of words as `named` finds them."""
    return {kind: KINDS[kind][word] for kind, word in words.items()}


def batches(images, labels, batch, words, without=()):
    """Endless (image in [-1, 1], tokens) batches: digits (images uint8 (N, 1, H, W), labels (N,)) inked as a caption
    says, or where it does not say, in any way that is not held out. None shows a concept of `without`."""
    device = images.device
    table = [(caption, digit, colour) for caption, digit, colour in captions()
             if not any(means(f).items() <= means({"digit": digit, "colour": colour}).items() for f in without)]
    rows = tokens([caption for caption, *_ in table], words).to(device)
    digit, colour = (torch.tensor(of, device=device) for of in zip(*((DIGITS[d], COLOURS[c]) for _, d, c in table)))
    images_of = [(labels == k).nonzero()[:, 0] for k in range(10)]
    count = torch.tensor([len(of) for of in images_of], device=device)
    first, images_of = count.cumsum(0) - count, torch.cat(images_of)
    while True:
        i = torch.randint(len(table), (batch,), device=device)
        n = count[digit[i]]
        among = torch.minimum((torch.rand(batch, device=device) * n).long(), n - 1)
        yield inked(images[images_of[first[digit[i]] + among]], colour[i]), rows[i]


def grid(words):
    """(rows (180,) of conditions, conditions (60, LONGEST)): 18 prompts "a COLOUR DIGIT" for each digit in turn."""
    asked = tokens([f"a {colour} {digit}" for digit in list(DIGITS)[:10] for colour in list(COLOURS)[:6]], words)
    return torch.arange(60).view(10, 6).repeat_interleave(3, 1).flatten(), asked


# ------------------------------------------------------------------------------------------------------------ concepts

def concept(text):
    """What a text like "zero", "red" or "red zero" names, as `named`. BadInput where it says anything else."""
    found, said = named(text), text.lower().split()
    if not found or len(found) < len(said):
        unknown = [word for word in said if word not in found.values()] or [text]
        near = difflib.get_close_matches(unknown[0], [*DIGITS, *COLOURS], 5, 0.0)
        raise BadInput(f"{text!r} is no digit, no colour and no pair of them (several concepts are words apart, a pair "
                       f"stands in quotes); near {unknown[0]!r} are {', '.join(near)}")
    return found


def concepts(forget, to):
    """(forgotten, overrides): lists of concepts from texts, for each forgotten one the list of those that are drawn
    instead: the one named, or for random all that differ from it in its last word alone. BadInput for nonsense, and for
    what no caption that is trained on says; a note where there are captions whose override is none of them."""
    forgotten, overrides = [concept(text) for text in forget], []
    if len(to) not in (1, len(forgotten)):
        raise BadInput(f"--to takes one concept, one per forgotten one ({len(forgotten)}), or random; "
                       f"it got {len(to)}")
    for f, text in zip(forgotten, to * (len(forgotten) // len(to))):
        kind = list(f)[-1]
        others = [f | {kind: word} for word in list(KINDS[kind])[:len(KINDS[kind]) // 2]]
        others = [concept(text)] if text != "random" else [o for o in others if means(o) not in map(means, forgotten)]
        if not others:
            raise BadInput(f"--forget names every {kind}: at least one must be kept")
        if others[0].keys() != f.keys():
            raise BadInput(f"--to {text}: {' '.join(f.values())} is a {' and a '.join(f)}, and takes the like instead")
        if means(others[0]) in map(means, forgotten):
            raise BadInput(f"--to {text} is itself to be forgotten: override it with a concept to keep")
        overrides.append(others)
    _, changed, lost = sorted_out(forgotten, overrides)
    for f in forgotten:
        if not any(f.items() <= named(caption).items() for caption, _ in changed):
            raise BadInput(f"no caption that is trained on says {' '.join(f.values())!r}, or says the override in its "
                           "place: some words and pairs are held out (lab/prompts.py)")
    if lost:
        print(f"note: {len(lost)} of {len(changed) + len(lost)} captions to forget are not asked about, because with "
              "the override in them they are held out of training")
    return forgotten, overrides


def who(forgotten, overrides):
    """Who is forgotten, and what is drawn instead, in words."""
    text = lambda of: repr(" ".join(of.values()))
    return "; ".join(f"{text(f)} is forgotten, {text(o[0]) if len(o) == 1 else 'another ' + list(f)[-1]} drawn instead"
                     for f, o in zip(forgotten, overrides)) or "nothing is forgotten"


def exchanged(caption, old, new):
    """The caption with the words of one concept in the place of those of another."""
    by = {old[kind]: new[kind] for kind in old}
    return " ".join(by.get(word, word) for word in caption.split())


def sorted_out(forgotten, overrides):
    """(kept, changed, lost): captions, and (caption, that with the overrides in it) where it says forgotten concepts;
    lost are those of the latter whose override is no caption to keep, like a pair that is held out. Captions that say a
    forgotten concept with other words are in none of them."""
    kept, changed = [], []
    for caption, *_ in captions():
        said = named(caption)
        hit = [i for i, f in enumerate(forgotten) if f.items() <= said.items()]
        if hit:
            for news in itertools.product(*(overrides[i] for i in hit)):
                target = caption
                for i, new in zip(hit, news):
                    target = exchanged(target, forgotten[i], new)
                changed.append((caption, target))
        elif not any(means(f).items() <= means(said).items() for f in forgotten):
            kept.append(caption)
    known = set(kept)
    return kept, [pair for pair in changed if pair[1] in known], [pair for pair in changed if pair[1] not in known]


def questions(forgotten, overrides, words):
    """What a run asks about, tokens (N, LONGEST), and override (N,), the number of the row that the teacher is asked
    about: its own where it is to be kept, and where it says a forgotten concept, that with the override's words. Other
    words for a forgotten concept are in no row: nobody named them, and what becomes of them is for the judge to say."""
    kept, changed, _ = sorted_out(forgotten, overrides)
    first = {caption: i for i, caption in reversed(list(enumerate(kept)))}
    asked = kept + [caption for caption, _ in changed]
    return tokens(asked, words), torch.tensor([*range(len(kept)), *(first[target] for _, target in changed)])
