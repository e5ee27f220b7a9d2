"""A training run that survives Ctrl-C, SIGKILL and a full disk, and goes on to the same weights, bit for bit."""
import csv
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from lab.checkpoint import read_file, save_atomically
from lab.cli import check_ranges, comparable, setting
from lab.data import KNOWN
from lab.device import rng_states, set_rng_states
from lab.errors import BadInput, RunFailed

WRITTEN = ("checkpoint.pt", "log.csv", "metrics.json", "generator.pt", "both.pt", "teacher.pt", "judge.pt",
           "samples.png", "curves.png")  # what --overwrite removes
LOCK = ".lock"
APART = 30  # a checkpoint is so many times its own duration away from the last one, at least


@dataclass
class RunSettings:
    """What every run can be told."""
    seed: int = setting(0, "random seed", at_least=0, below=2 ** 32)
    device: str = setting("auto", "auto, cpu, cuda or mps", trains=False)
    out: str = setting("", "folder to write to (default: one in runs/, named after the data set and what is done)",
                       trains=False)
    save_every: float = setting(30.0, "seconds between checkpoints, or more where saving takes long", above=0,
                                trains=False)
    resume: bool = setting(False, "continue the run in the folder", trains=False)
    overwrite: bool = setting(False, "replace the run in the folder", trains=False)

    def fill(self, recipe):
        """Take what is None from a recipe, then check all ranges. Returns what was taken."""
        taken = {k: v for k, v in recipe.items() if hasattr(self, k) and getattr(self, k) is None}
        for name, value in taken.items():
            setattr(self, name, value)
        check_ranges(self)
        return taken


def lock(folder):
    """The folder, which must be there, for this process alone until what is returned is closed; the end of a process,
    a kill included, closes it. BadInput where another one has it."""
    file = open(Path(folder) / LOCK, "a")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:
        file.close()
        raise BadInput(f"another run is writing to {folder}: wait for its end, or choose another --out") from e
    except OSError as e:  # a file system without locks
        print(f"note: {folder} cannot be locked ({e.strerror}): start no second run there")
    return file


def decay(step, steps):
    """Factor on a learning rate: 1 for the first half of the run, then linearly to zero."""
    return min(1.0, 2 * (1 - step / steps))


@torch.no_grad()
def update_average(average, model, decay, step):
    """average <- beta average + (1 - beta) model, weight by weight, after step number `step` (from 0).
    beta = decay, or (1 + step) / (8 + step) while that is smaller, so that the first steps do not linger."""
    beta = min(decay, (1 + step) / (8 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - beta)


class Run:
    """A run in the folder s.out, whose steps a generator makes and `steps` counts, shows, checks and saves.

        run = Run(s, state, pinned)                                # resumes here, if s.resume
        for terms in run.steps(training(s, **state, first=run.step)):
            if run.step % 100 == 0:
                run.log(terms)

    s: settings with out, steps, save_every, resume and overwrite. state: {name: anything with state_dict and
    load_state_dict}, all that changes while training. pinned: {name: value}, what a run that goes on must find as it
    was, like the digest of its teacher. All of them, the step, the random states and the settings go to
    out/checkpoint.pt every `save_every` seconds, at the end, and on Ctrl-C; what is logged goes to out/log.csv.
    Raises BadInput where the folder holds another run, RunFailed where a loss or a weight is not finite.
    """

    def __init__(self, s, state, pinned=None):
        self.s, self.out, self.state, self.pinned = s, Path(s.out), state, pinned or {}
        self.path, self.step, self.seconds, self.history = self.out / "checkpoint.pt", 0, 0.0, []
        if s.resume and s.overwrite:
            raise BadInput("--resume continues the run in the folder and --overwrite replaces it: say one of them")
        if s.resume and not self.path.exists():
            raise BadInput(f"nothing was saved at {self.path}, no such file: start again without --resume")
        if self.out.is_dir() and {f.name for f in self.out.iterdir()} - {LOCK} and not (s.resume or s.overwrite):
            raise BadInput(f"{self.out} holds a run already; "
                           "continue it with --resume, replace it with --overwrite, or choose another --out")
        data = getattr(s, "data", "mnist")
        if data not in KNOWN and Path(data).resolve() in (self.out.resolve(), *self.out.resolve().parents):
            raise BadInput(f"{self.out} is inside the data set, {data}: choose another --out")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.out)
            weakref.finalize(self, self.lock.close)
        except OSError as e:
            raise BadInput(f"cannot write to {self.out}: {e.strerror}") from e
        if s.resume:
            self._restore()
        for old in WRITTEN if not s.resume else ():
            (self.out / old).unlink(missing_ok=True)

    def _restore(self):
        saved = read_file(self.path, "run")
        if lacking := {"state", "pinned"} - saved.keys() or self.state.keys() - saved["state"].keys():
            raise BadInput(f"cannot resume {self.out}: its checkpoint, of an earlier version of this code, "
                           f"lacks {', '.join(sorted(lacking))}")
        refuse_changed(self.out, saved["settings"], comparable(self.s))
        for name, value in self.pinned.items():
            if (was := saved["pinned"].get(name)) != value:
                raise BadInput(f"cannot resume {self.out}: its {name} was {was} and is {value}")
        for name, part in self.state.items():
            try:
                part.load_state_dict(saved["state"][name])
            except RuntimeError as e:
                raise BadInput(f"cannot resume {self.out}: the {name} in its checkpoint is of another shape") from e
        self.step, self.seconds, self.history = saved["step"], saved["seconds"], saved["history"]
        set_rng_states(saved["rng"])
        self._write_log()

    def save(self):
        for name, part in self.state.items():
            if (isinstance(part, torch.nn.Module)
                    and not all(torch.isfinite(v).all() for v in part.state_dict().values())):
                raise RunFailed(f"weights of {name} are not finite after step {self.step}: try a smaller "
                                f"learning rate. The last good checkpoint, if there is one, is still at {self.path}")
        save_atomically({"kind": "run", "state": {k: v.state_dict() for k, v in self.state.items()},
                         "pinned": self.pinned, "step": self.step, "seconds": self.seconds, "history": self.history,
                         "settings": comparable(self.s), "rng": rng_states()}, self.path)
        self._write_log()

    def _write_log(self):
        if not self.history:
            return
        partial = self.out / "log.csv.partial"
        try:
            with open(partial, "w", newline="") as f:
                rows = csv.DictWriter(f, list(dict.fromkeys(key for row in self.history for key in row)))
                rows.writeheader()
                rows.writerows(self.history)
            os.replace(partial, self.out / "log.csv")
        except OSError as e:  # like a spreadsheet that holds it open; the checkpoint has it all for the next time
            tqdm.write(f"note: {self.out / 'log.csv'} could not be written now: {e.strerror}", file=sys.stderr)

    def log(self, numbers):
        """A row of out/log.csv; some of it is shown beside the progress bar."""
        self.history.append({"step": self.step, "seconds": round(self._elapsed(), 2), **numbers})
        shown = [k for k in ("ua", "kept_accuracy", "fd", "loss") if k in numbers]
        self.bar.set_postfix({k: f"{numbers[k]:.3g}" for k in shown})

    def _elapsed(self):
        now = time.monotonic()
        self.seconds, self.last = self.seconds + now - self.last, now
        return self.seconds  # of work, earlier parts of a resumed run included

    def steps(self, training):
        """Yields the loss terms, {name: number}, of each step that the generator `training` makes."""
        stopped = []  # Ctrl-C waits for the end of the step, so that what is saved is consistent
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        previous = {which: signal.signal(which, lambda *_: stopped.append(True)) for which in signals}
        self.bar = tqdm(total=self.s.steps, initial=self.step, unit="step", dynamic_ncols=True, mininterval=0.5)
        saved_at, saving = time.monotonic(), 0.0
        self.last = saved_at
        try:
            for terms in training:
                self.step += 1
                terms = dict(zip(terms, torch.stack(list(terms.values())).tolist()))  # one wait for the device
                for name, value in terms.items():
                    if not math.isfinite(value):
                        raise RunFailed(f"{name} is {value} at step {self.step}: try a smaller learning rate (--lr). "
                                        f"The last good checkpoint, if there is one, is {self.path}")
                yield terms
                self.bar.update()
                self._elapsed()
                if (self.last - saved_at > max(self.s.save_every, APART * saving) or stopped
                        or self.step == self.s.steps):
                    before = time.monotonic()
                    self.save()
                    saved_at = time.monotonic()
                    saving = saved_at - before
                if stopped:
                    self.bar.close()
                    print(f"stopped after step {self.step}; continue with: {resume_command()}", file=sys.stderr)
                    sys.exit(130)
        finally:
            self.bar.close()
            self.lock.close()
            for which, handler in previous.items():
                signal.signal(which, handler)


def resume_command():
    """This command, to go on with, in the quotes of the system's shell."""
    argv = ["python", *(a for a in sys.argv if a not in ("--resume", "--overwrite")), "--resume"]
    return subprocess.list2cmdline(argv) if os.name == "nt" else shlex.join(argv)


def refuse_changed(out, was, now):
    """BadInput where the run in the folder `out` was begun with the settings `was`
    and would go on with others, `now`."""
    if differ := [f"{k} was {was.get(k)!r} and is {now.get(k)!r}"
                  for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k)]:
        raise BadInput(f"cannot resume {out} with other settings: {'; '.join(differ)}")
