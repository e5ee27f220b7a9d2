"""A training run that survives Ctrl-C, SIGKILL and a full disk, and is resumed to the same weights, bit for bit."""
import csv
import math
import os
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from edm_unet import BadInput, RunFailed, Stopped, load_checkpoint, save_checkpoint, watch_pace
from lab.core.options import comparable, defaults, setting

SAVING_SHARE = 30  # the time between checkpoints is at least this many times the duration of the last one


@dataclass
class RunSettings:
    """Settings of every run."""
    seed: int = setting(0, "random seed", at_least=0, below=2 ** 32)
    device: str = setting("auto", "auto, cpu, cuda or mps", trains=False)
    out: str = setting("", "folder to write to (default: one in runs/, named after what is done)", trains=False)
    save_every: float = setting(30.0, "seconds between checkpoints, or more where saving takes long", above=0,
                                trains=False)
    resume: bool = setting(False, "go on with the run in the folder", trains=False)


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Run:
    """A run in the folder s.out. `steps` counts, shows, checks and saves the steps that a training loop yields.

        run = Run(s, state, pinned)                                # resumes, if s.resume
        for terms in run.steps(training(s, **state, first=run.step)):
            if run.step % 100 == 0:
                run.log(terms)

    s: settings with out, steps, save_every and resume. state: {name: network or optimizer}, everything that training
    changes. pinned: {name: value}, what else must not change when the run is resumed, such as the digest of a teacher.
    A setting that is in `pinned` too is compared by its value there: a label has a name and a number.
    A checkpoint is written to out/checkpoint.pt every `save_every` seconds, at the end and on Ctrl-C; `log` writes
    out/log.csv. Raises BadInput where the folder holds another run, RunFailed where a loss or weight is not finite.
    """

    def __init__(self, s, state, pinned=None):
        self.s, self.out, self.state = s, Path(s.out), state
        self.fixed = {**comparable(s), **(pinned or {})}
        self.path, self.step, self.seconds, self.history = self.out / "checkpoint.pt", 0, 0.0, []
        try:
            self.out.mkdir(parents=True, exist_ok=s.resume)
        except FileExistsError as e:
            raise BadInput(f"{self.out} is there already: --resume goes on with it, --out names another folder") from e
        except OSError as e:
            raise BadInput(f"cannot write to {self.out}: {e.strerror}") from e
        if self.path.exists():
            self.step, self.seconds = load_checkpoint(self.path, self.fixed, state, defaults(s))
            self.history = self._read_log()
        else:
            save_checkpoint(self.path, 0, 0.0, self.fixed, state)

    def _read_log(self):
        path = self.out / "log.csv"
        if not path.exists():
            return []
        with open(path, newline="") as f:
            return [row for row in csv.DictReader(f) if int(row["step"]) <= self.step]

    def save(self):
        save_checkpoint(self.path, self.step, self.seconds, self.fixed, self.state)
        if not self.history:
            return
        partial = self.out / "log.csv.partial"
        try:
            with open(partial, "w", newline="") as f:
                rows = csv.DictWriter(f, list(dict.fromkeys(key for row in self.history for key in row)))
                rows.writeheader()
                rows.writerows(self.history)
            os.replace(partial, self.out / "log.csv")
        except OSError as e:  # such as a spreadsheet that holds the file open
            tqdm.write(f"note: {self.out / 'log.csv'} could not be written now: {e.strerror}", file=sys.stderr)

    def log(self, numbers):
        """Add a row to out/log.csv, and show some of it beside the progress bar."""
        self.history.append({"step": self.step, "seconds": round(self._elapsed(), 2), **numbers})
        shown = [name for name in ("ua", "kept_accuracy", "fd", "loss") if name in numbers]
        self.bar.set_postfix({name: f"{numbers[name]:.3g}" for name in shown})

    def _elapsed(self):
        now = time.monotonic()
        self.seconds, self.last = self.seconds + now - self.last, now
        return self.seconds  # of work, earlier parts of a resumed run included

    def steps(self, training):
        """Yield the loss terms {name: number} of each step of the generator `training`."""
        stopped = []  # Ctrl-C waits for the end of the step, so that the checkpoint is consistent
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        previous = {which: signal.signal(which, lambda *_: stopped.append(True)) for which in signals}
        self.bar = tqdm(total=self.s.steps, initial=self.step, unit="step", dynamic_ncols=True, mininterval=0.5)
        saved_at, saving = time.monotonic(), 0.0
        self.last = saved_at
        try:
            for terms in watch_pace(training):
                self.step += 1
                terms = dict(zip(terms, torch.stack(list(terms.values())).tolist()))  # one wait for the device
                for name, value in terms.items():
                    if not math.isfinite(value):
                        raise RunFailed(f"{name} is {value} at step {self.step}: try a smaller learning rate (--lr). "
                                        f"{self.path} has the last good step")
                yield terms
                self.bar.update()
                self._elapsed()
                due = self.last - saved_at > max(self.s.save_every, SAVING_SHARE * saving)
                if due or stopped or self.step == self.s.steps:
                    before = time.monotonic()
                    self.save()
                    saved_at = time.monotonic()
                    saving = saved_at - before
                if stopped:
                    raise Stopped
        finally:
            self.bar.close()
            for which, handler in previous.items():
                signal.signal(which, handler)
