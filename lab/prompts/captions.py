"""Captions of MNIST's digits in coloured ink: the data of a text-to-image model in miniature.

A caption is a template with words for a digit and a colour, for one of the two, or for neither. Each digit and each
colour has two words. Some captions are held out of every training: those of two templates, those of six pairs of a
digit and a colour (no image of these pairs is trained on either), and those of two numerals that also name a colour.

A concept is what can be forgotten: a digit, a colour, or a pair of both, in the words of the command line. It is a dict
of words such as {"digit": "zero"} or {"colour": "red", "digit": "zero"}. The caption "a red 0" means {"digit": "zero"},
but does not name it.
"""
import difflib
import itertools
from dataclasses import dataclass

import torch

from edm_unet import BadInput

DIGITS = {word: k for k, word in enumerate("zero one two three four five six seven eight nine".split())}
DIGITS |= {str(k): k for k in range(10)}
COLOURS = {word: k for k, word in enumerate("red yellow green cyan blue magenta".split())}  # colour k: hue 60 k degrees
COLOURS |= {word: k for k, word in enumerate("crimson golden emerald turquoise azure fuchsia".split())}
FIRST_DIGITS, FIRST_COLOURS = list(DIGITS)[:10], list(COLOURS)[:6]  # the first of the two words for each
KINDS = {"digit": DIGITS, "colour": COLOURS}

TEMPLATES = ("a {colour} {digit}", "the digit {digit} in {colour}", "a {digit} drawn with {colour} ink",
             "a picture of a {colour} {digit}", "handwritten {digit} in {colour}", "a {digit}", "the digit {digit}",
             "a picture of a {digit}", "a {colour} digit", "something drawn with {colour} ink", "a handwritten digit")
UNSEEN_TEMPLATES = ("the {colour} digit {digit}", "{digit} in {colour} ink")
UNSEEN_PAIRS = ((3, 0), (6, 1), (4, 2), (7, 3), (5, 4), (8, 5))  # numbers of digit and colour
NEVER_COLOURED = ("2", "9")                                      # numerals that no training caption has with a colour

WORDS = tuple(dict.fromkeys(" ".join(TEMPLATES + UNSEEN_TEMPLATES).format(digit="", colour="").split()))
WORDS += (*DIGITS, *COLOURS)
LONGEST = 8  # words of a prompt


# ------------------------------------------------------------------------------------------------------ text and images

def tokens(prompts, words):
    """Numbers of the words of prompts, (N, LONGEST) int64: positions in `words` from 1, then zeros.

    BadInput for a prompt that is too long, or has a word that is not in `words`.
    """
    number = {word: i for i, word in enumerate(words, 1)}
    rows = []
    for prompt in prompts:
        found = [word.strip(".,;:!?") for word in prompt.lower().split()]
        found = [word for word in found if word]
        for word in found:
            if word not in number:
                near = ", ".join(difflib.get_close_matches(word, words, 5, 0.0))
                raise BadInput(f"{prompt!r}: this network has no word {word!r}; the nearest are {near}")
        if len(found) > LONGEST:
            raise BadInput(f"{prompt!r} has {len(found)} words; this network reads at most {LONGEST}")
        rows.append([number[word] for word in found] + [0] * (LONGEST - len(found)))
    return torch.tensor(rows)


def rgb(hue, saturation, value):
    """Colours (..., 3) in [0, 1] from hue (in sixths of the circle), saturation and value, each (...)."""
    k = (hue[..., None] + torch.tensor([5.0, 3.0, 1.0], device=hue.device)) % 6
    value = value[..., None]
    return value - value * saturation[..., None] * torch.minimum(k, 4 - k).clamp(0, 1)


def inked(images, colour):
    """Grey images uint8 (B, 1, H, W) in ink of a colour (B,) on black: (B, 3, H, W) in [-1, 1].

    The hue is within 10 degrees of the colour's. Saturation and value are in [0.75, 1].
    """
    u = torch.rand(3, len(colour), device=images.device)
    ink = rgb(colour + (2 * u[0] - 1) / 6, 0.75 + u[1] / 4, 0.75 + u[2] / 4)
    return images.float() / 255 * ink[:, :, None, None] * 2 - 1


def named_words(text):
    """The words of a text that name a digit or a colour: {"digit": word, "colour": word}, or fewer."""
    found = {}
    for word in text.lower().split():
        for kind, numbers in KINDS.items():
            if word in numbers:
                found[kind] = word
    return found


def numbers(words):
    """{"digit": number, "colour": number} of such words."""
    return {kind: KINDS[kind][word] for kind, word in words.items()}


def names(text, concept):
    """Whether a text has the words of a concept."""
    return concept.items() <= named_words(text).items()


def means(text, concept):
    """Whether a text has words of the same meaning as those of a concept."""
    return numbers(concept).items() <= numbers(named_words(text)).items()


# ------------------------------------------------------------------------------------------------------------- captions

@dataclass(frozen=True)
class Caption:
    """A text, and the words for digit and colour of an image that fits, whether or not the text has them."""
    text: str
    digit: str
    colour: str

    def shows(self, concept):
        """Whether the image shows a concept."""
        shown = numbers({"digit": self.digit, "colour": self.colour})
        return numbers(concept).items() <= shown.items()


def captions(templates=TEMPLATES, held_out=False):
    """Captions of the templates: those to train on, or those held out.

    Each template is filled with each pair of words, also where it has no place for them: all templates are about
    equally frequent.
    """
    found = []
    for template, digit, colour in itertools.product(templates, DIGITS, COLOURS):
        text = template.format(digit=digit, colour=colour)
        unseen_pair = (DIGITS[digit], COLOURS[colour]) in UNSEEN_PAIRS
        unseen_word = digit in NEVER_COLOURED and named_words(text).keys() == {"digit", "colour"}
        if (unseen_pair or unseen_word) == held_out:
            found.append(Caption(text, digit, colour))
    return found


def batches(images, labels, batch, words, without=()):
    """Yield (images (B, 3, H, W) in [-1, 1], tokens (B, LONGEST)) of random training captions, for ever.

    images uint8 (N, 1, H, W), labels (N,): MNIST. without: concepts that no image shows.
    """
    device = images.device
    table = [caption for caption in captions() if not any(caption.shows(concept) for concept in without)]
    rows = tokens([caption.text for caption in table], words).to(device)
    digit = torch.tensor([DIGITS[caption.digit] for caption in table], device=device)
    colour = torch.tensor([COLOURS[caption.colour] for caption in table], device=device)
    of_digit = [(labels == k).nonzero()[:, 0] for k in range(10)]
    count = torch.tensor([len(found) for found in of_digit], device=device)
    first, sorted_by_digit = count.cumsum(0) - count, torch.cat(of_digit)
    while True:
        i = torch.randint(len(table), (batch,), device=device)
        n = count[digit[i]]
        j = torch.minimum((torch.rand(batch, device=device) * n).long(), n - 1)  # rounding can make j n
        yield inked(images[sorted_by_digit[first[digit[i]] + j]], colour[i]), rows[i]


def grid(words):
    """(rows (180,), conditions (60, LONGEST)): 18 prompts "a COLOUR DIGIT" for each digit, for pictures."""
    conditions = tokens([f"a {colour} {digit}" for digit in FIRST_DIGITS for colour in FIRST_COLOURS], words)
    return torch.arange(60).view(10, 6).repeat_interleave(3, 1).flatten(), conditions


# ------------------------------------------------------------------------------------------------------------- concepts

def phrase(concept):
    """The words of a concept, in quotes."""
    return repr(" ".join(concept.values()))


def read_concept(text):
    """The concept of a text such as "zero", "red" or "red zero". BadInput for any other text."""
    found, words = named_words(text), text.lower().split()
    if not found or len(found) < len(words):
        unknown = [word for word in words if word not in found.values()] or [text]
        near = ", ".join(difflib.get_close_matches(unknown[0], [*DIGITS, *COLOURS], 5, 0.0))
        raise BadInput(f"{text!r} is no digit, no colour and no pair of them; the words nearest to {unknown[0]!r} are "
                       f"{near}. Several concepts are separate words, and a pair is in quotes")
    return found


def all_overrides(concept, forgotten):
    """Concepts that differ from a concept in its last word alone, and are not to be forgotten."""
    kind = list(concept)[-1]
    first_words = FIRST_DIGITS if kind == "digit" else FIRST_COLOURS
    others = [{**concept, kind: word} for word in first_words]
    to_forget = [numbers(f) for f in forgotten]
    return [other for other in others if numbers(other) not in to_forget]


def read_concepts(forget, to):
    """(forgotten, overrides) from words of the command line: concepts, and for each the list of its overrides.

    An override is drawn in the place of the forgotten concept. Where `to` is random, there are several. BadInput where
    the words do not fit together, or no training caption has them. Prints a note where some captions cannot be used.
    """
    if tuple(forget) == ("none",):
        if tuple(to) != ("random",):
            raise BadInput("--to has no effect with --forget none")
        return [], []
    forgotten = [read_concept(text) for text in forget]
    if len(to) not in (1, len(forgotten)):
        raise BadInput(f"--to takes one concept, one for each of the {len(forgotten)} to forget, or random; "
                       f"it got {len(to)}")
    overrides = []
    for concept, text in zip(forgotten, to * (len(forgotten) // len(to))):
        others = all_overrides(concept, forgotten) if text == "random" else [read_concept(text)]
        if not others:
            raise BadInput(f"--forget names every {list(concept)[-1]}: at least one must be kept")
        if others[0].keys() != concept.keys():
            raise BadInput(f"--to {text}: the override of {phrase(concept)} must be a {' and a '.join(concept)} too")
        if numbers(others[0]) in [numbers(f) for f in forgotten]:
            raise BadInput(f"--to {text} is itself to be forgotten: name a concept to keep")
        overrides.append(others)
    _, changed, unused = sort_captions(forgotten, overrides)
    for concept in forgotten:
        if not any(names(caption, concept) for caption, _ in changed):
            raise BadInput(f"no training caption has {phrase(concept)}, or none has the override in its place: some "
                           "words and pairs are held out (lab/prompts/captions.py)")
    if unused:
        print(f"note: {len(unused)} of {len(changed) + len(unused)} captions to forget are not used, because with the "
              "override in its place they are no training captions")
    return forgotten, overrides


def describe(forgotten, overrides):
    """What is forgotten and what is drawn instead, in words."""
    parts = []
    for concept, others in zip(forgotten, overrides):
        override = phrase(others[0]) if len(others) == 1 else f"a random other {list(concept)[-1]}"
        parts.append(f"{phrase(concept)} is forgotten, {override} drawn instead")
    return "; ".join(parts) or "nothing is forgotten"


def exchange(text, old, new):
    """The text with the words of the concept `new` in the place of those of `old`."""
    exchanged = {old[kind]: new[kind] for kind in old}
    return " ".join(exchanged.get(word, word) for word in text.split())


def sort_captions(forgotten, overrides):
    """(kept, changed, unused): training captions by what becomes of them.

    kept: texts that mean no forgotten concept. changed: (text, the same text with the overrides in it) where a text
    names forgotten concepts. unused: such pairs whose second text is not in kept, because that pair is held out.
    Texts that mean a forgotten concept in other words are in none of the three.
    """
    kept, pairs = [], []
    for caption in captions():
        text = caption.text
        found = [i for i, concept in enumerate(forgotten) if names(text, concept)]
        if found:
            for others in itertools.product(*(overrides[i] for i in found)):
                target = text
                for i, other in zip(found, others):
                    target = exchange(target, forgotten[i], other)
                pairs.append((text, target))
        elif not any(means(text, concept) for concept in forgotten):
            kept.append(text)
    kept_texts = set(kept)
    changed = [pair for pair in pairs if pair[1] in kept_texts]
    unused = [pair for pair in pairs if pair[1] not in kept_texts]
    return kept, changed, unused


def override_captions(forgotten, overrides, words):
    """(override (N,), conditions (N, LONGEST)): captions in the part that labels have in `lab.distill.train`.

    A caption to keep is its own override. The override of a caption that names a forgotten concept is the caption with
    the override's words in their place. Captions with other words for a forgotten concept are left out: the user did
    not name them, and the evaluation shows what became of them.
    """
    kept, changed, _ = sort_captions(forgotten, overrides)
    first = {}
    for i, text in enumerate(kept):
        first.setdefault(text, i)
    conditions = tokens(kept + [text for text, _ in changed], words)
    return torch.tensor([*range(len(kept)), *(first[target] for _, target in changed)]), conditions
