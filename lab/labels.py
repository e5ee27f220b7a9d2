"""Which labels are forgotten, and what is drawn instead: words of a command line as numbers."""
from pathlib import Path

from lab.errors import BadInput


def label_number(text, K):
    """The label that a word of the command line names, 0 to K - 1; BadInput for anything else."""
    if not text.isdecimal() or int(text) >= K:
        raise BadInput(f"label {text!r} is out of range: this network knows the labels 0 to {K - 1}")
    return int(text)


def label_numbers(s, K):
    """(c_f, c_o): lists of label numbers from the settings forget and to, c_o[i] overriding c_f[i], -1 for random.
    BadInput for nonsense."""
    forget, to = s.forget, s.to
    if forget == ("none",):
        if to != ("random",) or s.guidance != 1 or s.lambda_forget != 1 or s.lambda_anchor or s.forget_share:
            raise BadInput("--forget none forgets nothing: --to, --guidance, --lambda-forget, --lambda-anchor and "
                           "--forget-share have no meaning with it")
        return [], []
    c_f = [label_number(f, K) for f in forget]
    c_o = [-1] if to == ("random",) else [label_number(t, K) for t in to]
    if len(set(c_f)) < len(c_f):
        raise BadInput(f"--forget names a label twice: {' '.join(forget)}")
    if len(c_f) == K:
        raise BadInput(f"--forget names all {K} labels: at least one must be kept")
    if len(c_o) not in (1, len(c_f)):
        raise BadInput(f"--to takes one label, one per forgotten label ({len(c_f)}), or random; it got {len(c_o)}")
    if set(c_o) & set(c_f):
        raise BadInput(f"--to {min(set(c_o) & set(c_f))} is itself to be forgotten: override it with a label to keep")
    return c_f, c_o * (len(c_f) // len(c_o))


def run_name(s):
    """The folder of a run in runs/, where none is given: who is forgotten, and what is drawn instead."""
    return f"{Path(s.data).name}-" + ("sid" if s.forget == ("none",) else
                                      f"forget{'-'.join(s.forget)}-to{'-'.join(s.to)}")


def run_in_words(s, c_f, c_o):
    """What a run is about to do: labels, and the settings that its recipe gave."""
    what = "; ".join(f"{f} is forgotten, {'a random kept label' if o < 0 else o} drawn instead"
                     for f, o in zip(c_f, c_o)) or "nothing is forgotten"
    return f"{what}; {s.recipe}: {' '.join(f'{k}={v}' for k, v in s.taken.items())}"
