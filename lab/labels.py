"""Which labels are forgotten, and what is drawn instead: words of a command line as label numbers."""
import difflib
import re

from lab import prompts
from lab.data import data_name
from lab.errors import BadInput


def short(name):
    """A class name without its number: MNIST calls its classes "0 - zero"."""
    return re.sub(r"^\d+ - ", "", name)


def named(k, classes):
    """Label k for people: its name, and its number where the name is not that."""
    return str(k) if classes[k] == str(k) else f"{short(classes[k])} (label {k})"


def label_number(text, classes):
    """The label, 0 to K - 1, that a word of the command line means: the one of that name, else of that number. BadInput
    for anything else."""
    for spelled in (lambda name: name, str.casefold):
        if found := [k for k, name in enumerate(classes) if spelled(text) in (spelled(name), spelled(short(name)))]:
            break
    if len(found) > 1:
        raise BadInput(f"{text!r} names {len(found)} labels: {', '.join(classes[k] for k in found)}")
    number = int(text) if text.isdecimal() and int(text) < len(classes) else None
    if found:
        if number not in (None, found[0]):
            print(f"note: {text} is taken for the name of label {found[0]}, not for the number of {classes[number]!r}")
        return found[0]
    if number is None:
        known = classes if len(classes) <= 100 else difflib.get_close_matches(text, classes, 10, 0.0)
        raise BadInput(f"no label {text!r}: {' '.join(map(short, known))}, or 0 to {len(classes) - 1}")
    return number


def label_numbers(s, classes):
    """(c_f, c_o): lists of label numbers from the settings forget and to, c_o[i] overriding c_f[i], -1 for random; or,
    of a teacher that is asked with prompts, `lab.prompts.concepts`. BadInput for nonsense."""
    forget, to, K = s.forget, s.to, len(classes)
    for words, word in ((forget, "none"), (to, "random")):
        if words == (word,) and word in classes:
            raise BadInput(f"{word} has a meaning here, and is a class as well: say its number, {classes.index(word)}")
    if forget == ("none",):
        if (to != ("random",) or s.guidance != 1 or s.lambda_forget != 1
                or s.lambda_anchor or s.forget_share or s.anywhere):
            raise BadInput("--forget none forgets nothing: --to, --guidance, --lambda-forget, --lambda-anchor, "
                           "--forget-share and --anywhere have no meaning with it")
        return [], []
    if s.anywhere and (s.data == "prompts" or to == ("random",)):
        raise BadInput("--anywhere moves a label to forget onto the one that --to names: of labels, not of prompts")
    if s.data == "prompts":
        return prompts.concepts(forget, to)
    c_f = [label_number(f, classes) for f in forget]
    c_o = [-1] if to == ("random",) else [label_number(t, classes) for t in to]
    if len(set(c_f)) < len(c_f):
        raise BadInput(f"--forget names a label twice: {' '.join(forget)}")
    if len(c_f) == K:
        raise BadInput(f"--forget names all {K} labels: at least one must be kept")
    if len(c_o) not in (1, len(c_f)):
        raise BadInput(f"--to takes one label, one per forgotten label ({len(c_f)}), or random; it got {len(c_o)}")
    if both := set(c_o) & set(c_f):
        raise BadInput(f"--to {named(min(both), classes)} is itself to be forgotten: override it with a label to keep")
    return c_f, c_o * (len(c_f) // len(c_o))


def labels_only(data, instead):
    """BadInput where `data` is asked with prompts, and the program at hand asks with labels."""
    if data == "prompts":
        raise BadInput(f"prompts are asked otherwise than labels: {instead}")


def run_name(s, what=""):
    """The folder of a run in runs/, where none is given: the data set, who is forgotten, and what is drawn instead."""
    forget, to = ((words,) if isinstance(words, str) else words for words in (s.forget, s.to))
    words = "sid" if forget == ("none",) else f"forget{'-'.join(forget)}-to{'-'.join(to)}"
    words = words.replace(" ", "-") if s.data == "prompts" else words
    return re.sub(r"[^\w. -]+", "_", "-".join(filter(None, (data_name(s.data), what, words))))


def who(c_f, c_o, classes):
    """Who is forgotten, and what is drawn instead, by name."""
    if c_f and isinstance(c_f[0], dict):
        return prompts.who(c_f, c_o)
    return "; ".join(f"{named(f, classes)} is forgotten, "
                     f"{'a random kept label' if o < 0 else named(o, classes)} drawn instead"
                     for f, o in zip(c_f, c_o)) or "nothing is forgotten"
