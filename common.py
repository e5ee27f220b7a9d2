"""What every command of this project shares and no reader comes for: settings from the command line, the choice of
device, and a training run that survives Ctrl-C, SIGKILL and a full disk."""
import argparse
import csv
import dataclasses
import hashlib
import os
import platform
import random
import shlex
import signal
import sys
import time
import typing
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from edm_unet import CheckpointError, cpu_features, has_fast_bf16, read_file, save_atomically


class BadInput(ValueError):
    """The user asked for something that cannot be done; the message is one line that says what, and what to do."""


class RunFailed(RuntimeError):
    """The run cannot go on; the message says at which step, why, and what to try."""


def setting(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        raise BadInput(f"{message} (--help lists the options)")


def parse(cls, argv, description):
    """A settings dataclass from a command line: one option per field, --like-this for like_this.
    BadInput for anything else."""
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    types = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        name, kind = "--" + f.name.replace("_", "-"), types[f.name]
        if kind is bool:
            parser.add_argument(name, action="store_true", help=f.metadata["help"])
        elif kind is tuple:
            parser.add_argument(name, nargs="+", default=f.default, help=f.metadata["help"])
        else:
            parser.add_argument(name, type=kind, default=f.default, help=f.metadata["help"])
    values = vars(parser.parse_args(argv))
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def command(main):
    """Run main(argv) as a program: bad input is one line and exit code 2, a failed run one line and exit code 1."""
    try:
        main(sys.argv[1:])
    except (BadInput, CheckpointError) as e:
        sys.exit(_one_line(e, 2))
    except (RunFailed, OSError) as e:
        sys.exit(_one_line(e, 1))
    except KeyboardInterrupt:
        sys.exit(_one_line("interrupted", 130))
    except RuntimeError as e:
        # as torch says it of cuda and mps, and of the CPU
        if not ("out of memory" in str(e) or "can't allocate memory" in str(e)):
            raise
        sys.exit(_one_line(f"{str(e).splitlines()[0]}: try a smaller --batch, where the command has one", 1))


def _one_line(e, code):
    print("error:", " ".join(str(e).split()), file=sys.stderr)
    return code


def positive(s, *names):
    """BadInput unless each of the named settings is finite and above zero."""
    for name in names:
        value = getattr(s, name)
        if not (value > 0 and value < float("inf")):
            raise BadInput(f"--{name.replace('_', '-')} must be above zero and finite, not {value}")


def label_number(text, K):
    """The label that a word of the command line names, 0 to K - 1; BadInput for anything else."""
    if not text.isdecimal() or int(text) >= K:
        raise BadInput(f"label {text!r} is out of range: this network knows the labels 0 to {K - 1}")
    return int(text)


def pick_device(name):
    """torch.device for 'auto' (cuda, else mps, else cpu) or for the one named; BadInput if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("cpu, cuda and mps are known here")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise BadInput(f"--device {name} is not there: {str(e).splitlines()[0]}") from e
    return device


def machine(device):
    """What a reported number must say of where it was measured."""
    name = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else cpu_features().get("cpu_name", platform.processor()))
    return {"device": device.type, "name": name, "bf16": has_fast_bf16(device), "threads": torch.get_num_threads(),
            "torch": str(torch.__version__), "python": platform.python_version(), "system": platform.system()}


def check_run(s):
    """What every run's settings have in common."""
    positive(s, "save_every")
    if s.resume and s.overwrite:
        raise BadInput("--resume continues the run in the folder and --overwrite replaces it: say one of them")
    if not 0 <= s.seed < 2 ** 32:
        raise BadInput(f"--seed must lie in [0, 2^32), not {s.seed}")


def changed(s):
    """Names of the settings that are not at their default."""
    return {f.name for f in dataclasses.fields(s) if getattr(s, f.name) != f.default}


def refuse_useless(given, useful, when):
    """BadInput if an option was given that has no effect `when`, for instance "with --sample"."""
    if useless := given - useful:
        raise BadInput(f"--{min(useless).replace('_', '-')} has no meaning {when}")


def refuse_changed(out, was, now):
    """BadInput where the run in the folder `out` was begun with the settings `was`
    and would go on with others, `now`."""
    if differ := [f"{k} was {was.get(k)!r} and is {now.get(k)!r}"
                  for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k)]:
        raise BadInput(f"cannot resume {out} with other settings: {'; '.join(differ)}")


def refuse_generator(path, info):
    """BadInput where the entries of a checkpoint, `info`, are those of a one-step generator:
    the file at `path` is no teacher."""
    if "sigma_init" in info:
        raise BadInput(f"{path} is a one-step generator, not a teacher")


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class EMA:
    """Exponential moving average of a model's weights, with a warm-up so that the first steps do not linger."""

    def __init__(self, model, average, decay):
        self.model, self.average, self.decay = model, average.requires_grad_(False), decay

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (8 + step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)


class SameTeacher:
    """The part of a run that training leaves alone: a run that goes on must find the teacher that it began with."""

    def __init__(self, model):
        weights = b"".join(v.cpu().numpy().tobytes() for v in model.state_dict().values())
        self.sha256 = hashlib.sha256(weights).hexdigest()

    def state_dict(self):
        return {"sha256": self.sha256}

    def load_state_dict(self, saved):
        if saved != self.state_dict():
            raise BadInput("cannot resume: the teacher is another one than that which the run began with")


class Run:
    """A training run in the folder `out`: `for step in run:` counts, shows progress, saves and resumes.

    parts: {name: anything with state_dict / load_state_dict}, all that changes while training. Saved with the step, the
    random states and the settings to out/checkpoint.pt: every `save_every` seconds, at the end, and on Ctrl-C. A run
    resumed from there ends with the same weights, bit for bit on the CPU. `history` is a list of dicts, written to
    out/log.csv at every save.
    """

    def __init__(self, out, settings, parts, resume, overwrite, save_every):
        self.out, self.settings, self.parts, self.save_every = Path(out), settings, parts, save_every
        self.path, self.step, self.seconds, self.history = self.out / "checkpoint.pt", 0, 0.0, []
        if resume:
            self._restore()
        elif self.out.is_dir() and any(self.out.iterdir()) and not overwrite:
            raise BadInput(f"{self.out} holds a run already; "
                           "continue it with --resume, replace it with --overwrite, or choose another --out")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / ".writable").touch()
            (self.out / ".writable").unlink()
        except OSError as e:
            raise BadInput(f"cannot write to {self.out}: {e.strerror}") from e
        if not resume:
            for old in ("checkpoint.pt", "log.csv", "metrics.json", "generator.pt", "both.pt", "teacher.pt",
                        "judge.pt", "samples.png", "curves.png"):
                (self.out / old).unlink(missing_ok=True)

    def _restore(self):
        if not self.path.exists():
            raise BadInput(f"nothing was saved at {self.path}, no such file: start again without --resume")
        saved = read_file(self.path, "run")
        refuse_changed(self.out, saved["settings"], comparable(self.settings))
        if lacking := self.parts.keys() - saved["parts"].keys():
            raise BadInput(f"cannot resume {self.out}: its checkpoint, of an earlier version of this code, "
                           f"lacks {', '.join(sorted(lacking))}")
        for name, part in self.parts.items():
            try:
                part.load_state_dict(saved["parts"][name])
            except RuntimeError as e:
                raise BadInput(f"cannot resume {self.out}: the {name} in its checkpoint is of another shape") from e
        self.step, self.seconds, self.history = saved["step"], saved["seconds"], saved["history"]
        set_rng_states(saved["rng"])
        self.write_log()

    def elapsed(self):
        """Seconds of work, earlier parts of a resumed run included."""
        now = time.monotonic()
        self.seconds, self.last = self.seconds + now - self.last, now
        return self.seconds

    def save(self):
        for name, part in self.parts.items():
            if (isinstance(part, torch.nn.Module)
                    and not all(torch.isfinite(v).all() for v in part.state_dict().values())):
                raise RunFailed(f"weights of {name} are not finite after step {self.step}: try a smaller "
                                f"learning rate. The last good checkpoint, if there is one, is still at {self.path}")
        save_atomically({"kind": "run", "parts": {k: v.state_dict() for k, v in self.parts.items()}, "step": self.step,
                         "seconds": self.seconds, "history": self.history, "settings": comparable(self.settings),
                         "rng": rng_states()}, self.path)
        self.write_log()

    def write_log(self):
        if self.history:
            partial = self.out / "log.csv.partial"
            with open(partial, "w", newline="") as f:
                rows = csv.DictWriter(f, list(dict.fromkeys(key for row in self.history for key in row)))
                rows.writeheader()
                rows.writerows(self.history)
            os.replace(partial, self.out / "log.csv")

    def __iter__(self):
        interrupted = []  # Ctrl-C waits for the end of the step, so that what is saved is consistent
        previous = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
        self.bar = tqdm(total=self.settings.steps, initial=self.step, unit="step", dynamic_ncols=True, mininterval=0.5)
        saved_at = self.last = time.monotonic()
        try:
            while self.step < self.settings.steps:
                yield self.step
                self.step += 1
                self.bar.update()
                self.elapsed()
                if self.last - saved_at > self.save_every or interrupted or self.step == self.settings.steps:
                    self.save()
                    saved_at = time.monotonic()
                if interrupted:
                    self.bar.close()
                    argv = [a for a in sys.argv if a not in ("--resume", "--overwrite")]
                    print(f"stopped after step {self.step}; "
                          f"continue with: {shlex.join(['python', *argv, '--resume'])}", file=sys.stderr)
                    sys.exit(130)
        finally:
            self.bar.close()
            signal.signal(signal.SIGINT, previous)


def rng_states():
    """The random states of every kind of device that is in use."""
    return {"cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
            "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None}


def set_rng_states(states):
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"][:torch.cuda.device_count()])
    if states["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


def comparable(settings):
    """The settings that must not change between a run and its continuation:
    all but those that leave the training as it is."""
    ignored = {"resume", "overwrite", "out", "data_dir", "device", "compile", "save_every", "per_label", "fold",
               "sample", "label", "n"}
    return {k: v for k, v in dataclasses.asdict(settings).items() if k not in ignored}
