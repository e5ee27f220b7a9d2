"""Devices and circumstances that nobody here has: what can be said of them on the CPU."""
import copy
import functools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lab.run
import sfd_minimal
from conftest import CPU, ROOT, program, save_network
from edm_unet import WIDTH, Block, EDMPrecond, NetSettings, UNet
from lab import audit, evaluate
from lab.checkpoint import load_checkpoint
from lab.cli import command
from lab.device import pick_device
from lab.errors import BadInput
from lab.figures import samples_figure
from lab.run import Run, lock, resume_command

NET = NetSettings(resolution=8, num_classes=3, model_channels=16, channel_mult=(1, 1), num_blocks=1,
                  attn_resolutions=(8,))
S = SimpleNamespace(sigma_init=2.5, p_mean=0.0, p_std=1.2, sigma_min=0.002, sigma_max=80.0, u_max=0.8, alpha=1.0,
                    lambda_forget=1.0)


def networks():
    torch.manual_seed(0)
    teacher = EDMPrecond(NET)
    for p in teacher.parameters():  # what is zero at first would hide what depends on it
        p.data += 0.02 * torch.randn_like(p)
    return copy.deepcopy(teacher), copy.deepcopy(teacher), teacher.requires_grad_(False)


ADAM = functools.partial(torch.optim.Adam, lr=1e-2, betas=(0.0, 0.999), fused=True)


def step(generator, fake, teacher, steps=2, wrap=lambda model: model, batch=8, optimizer=ADAM):
    """`steps` of SFD with the same numbers each time; the generator's and the fake score's weights after them."""
    optimizers = [optimizer(m.parameters()) for m in (generator, fake)]
    override, kept = torch.tensor([1, 1, 2]), torch.tensor([1, 2])
    torch.manual_seed(1)
    for _ in range(steps):
        labels = sfd_minimal.draw_labels(batch, override, kept, teacher.conditions)
        sfd_minimal.sfd_step(wrap(generator), wrap(fake), teacher, *optimizers, torch.randn(batch, *teacher.shape),
                             *labels, S)
    return [p.detach() for m in (generator, fake) for p in m.parameters()]


def close(a, b, rtol=1e-5):
    return all((p - q).norm() <= rtol * q.norm() + 1e-7 for p, q in zip(a, b))


# ------------------------------------------------------------------------------------------------------ the step itself

def test_strided_gradients_take_the_right_step():
    """As compiled convolutions give them, which a fused Adam on the CPU would read in the wrong order."""
    def strided(p):
        if p.ndim == 4:
            p.register_hook(lambda g: g.contiguous(memory_format=torch.channels_last))
    plain, hooked = networks(), networks()
    for model in hooked[:2]:
        for p in model.parameters():
            strided(p)
    assert close(step(*hooked), step(*plain))


def test_adam_would_misread_strided_gradients():
    """Why: the same gradient, put there as it comes, is another step. Where this fails, torch has been mended."""
    p, g = torch.zeros(4, 3, 3, 3), torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    after = []
    for layout in (torch.contiguous_format, torch.channels_last):
        q = p.clone().requires_grad_()
        q.grad = g.contiguous(memory_format=layout)
        ADAM([q]).step()
        after.append(q.detach())
    assert not torch.allclose(*after)


SGD = functools.partial(torch.optim.SGD, lr=1e-4)  # Adam's first steps make much of a gradient that is all rounding

TWO = """
    import sys
    import torch
    from torch.nn.parallel import DistributedDataParallel
    import sfd_minimal
    import test_devices
    torch.set_num_threads(1)
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    generator, fake, teacher = test_devices.networks()
    torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)

    def half(draw):  # this process's half of what one process would draw
        def drawn(shape, *rest, **how):
            like = isinstance(shape, torch.Tensor)
            sizes = tuple(shape.shape) if like else (shape, *rest)
            return draw(2 * sizes[0], *sizes[1:], **how).chunk(2)[rank]
        return drawn

    randn, rand = torch.randn, torch.rand
    torch.randn, torch.rand, torch.randn_like = half(randn), half(rand), half(randn)
    labels = sfd_minimal.draw_labels
    sfd_minimal.draw_labels = lambda batch, *rest: tuple(v.chunk(2)[rank] for v in labels(2 * batch, *rest))
    parallel = {model: DistributedDataParallel(model) for model in (generator, fake)}
    after = test_devices.step(generator, fake, teacher, 3, parallel.get, batch=4, optimizer=test_devices.SGD)
    torch.save(after, out)
    torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_take_the_step_of_one(tmp_path, monkeypatch):
    """Under DistributedDataParallel, each with half of the batch."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    processes = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(TWO), str(rank), str(tmp_path / "store"),
                                   str(tmp_path / f"{rank}.pt")], env=environment, stderr=subprocess.PIPE, text=True)
                 for rank in (0, 1)]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.randn(x.shape))  # in x's own layout it would be another
    one = step(*networks(), steps=3, optimizer=SGD)
    for rank in (0, 1):
        assert close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), one)
    assert not close([p for m in networks()[:2] for p in m.parameters()], one), "nothing was learned"


class Waits(TorchDispatchMode):
    """Counts what a GPU would have to be waited for."""
    FOR = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        self.seen += [name] * (name in self.FOR)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("guidance, waits", [(1.0, []), (1.5, ["nonzero"])])
def test_a_step_waits_for_nothing(guidance, waits):
    generator, fake, teacher = networks()
    optimizers = [ADAM(m.parameters()) for m in (generator, fake)]
    c_phi, c_psi, forgotten = sfd_minimal.draw_labels(8, torch.tensor([1, 1, 2]), torch.tensor([1, 2]),
                                                      teacher.conditions)
    with Waits() as seen:
        D = sfd_minimal.guided(teacher, c_psi, forgotten, guidance) if guidance != 1 else teacher
        z = torch.randn(8, *teacher.shape)
        sfd_minimal.sfd_step(generator, fake, D, *optimizers, z, c_phi, c_psi, forgotten, S)
    assert seen.seen == waits


# --------------------------------------------------------------------------------------------------------- the network

def inputs(n=8):
    torch.manual_seed(3)
    return torch.randn(n, *networks()[2].shape), torch.rand(n, 1, 1, 1) + 0.1, torch.eye(3)[torch.arange(n) % 3]


def test_an_outer_autocast_is_followed_and_never_stale():
    network = networks()[0]
    with torch.no_grad():
        network.bf16 = True
        fast = network(*inputs())
        network.bf16 = False
        exact = network(*inputs())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.is_autocast_enabled("cpu") and torch.equal(network(*inputs()), fast)
            assert torch.is_autocast_enabled("cpu"), "the caller's is left on"
    assert not torch.equal(exact, fast)
    results = []
    for outer in (True, False):  # weights that change between two evaluations, as an optimizer's step does it
        network = networks()[0]
        network.bf16 = True
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            network(*inputs()).sum().backward()
            torch.optim.SGD(network.parameters(), 1e-3).step()
            results.append(network(*inputs()).detach())
    assert torch.equal(*results)


def test_attention_is_asked_in_the_layout_of_fused_kernels(monkeypatch):
    seen, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: seen.extend(qkv) or attention(*qkv))
    Block(16, 16, 64, attention=True, prompted=True)(torch.ones(2, 16, 4, 4), torch.ones(2, 64),
                                                     torch.ones(2, 8, WIDTH))  # attention to the prompt
    assert len(seen) == 3 and all(v.stride(-1) == 1 for v in seen)


def saved_bytes(network):
    """What an evaluation keeps for the gradient, weights aside, and the gradient."""
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t):
        x, sigma, c = inputs()
        loss = network(x.requires_grad_(), sigma, c).square().sum()
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    return (sum(n for of, n in sizes.items() if of not in weights),
            torch.autograd.grad(loss, [x, *network.parameters()]))


def test_a_micro_batch_keeps_less_and_gives_the_same_gradient():
    network = networks()[0]
    whole, gradient = saved_bytes(network)
    network.micro_batch = 2
    parts, gradient_of_parts = saved_bytes(network)
    assert parts < whole / 20 and close(gradient_of_parts, gradient)
    network.micro_batch = 8
    assert all(map(torch.equal, saved_bytes(network)[1], gradient)), "a batch that fits is left whole"


def test_the_command_evaluates_in_micro_batches(tiny, tmp_path, monkeypatch):
    """Generator, fake score and teacher alike."""
    seen, forward = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, *rest: seen.append(len(x)) or forward(self, x, *rest))
    save_network(load_checkpoint(tiny)[0], tmp_path / "teacher.pt", data="runes")
    base = ["--teacher", str(tmp_path / "teacher.pt"), "--data", "runes", "--steps", "1", "--batch", "8", "--device",
            "cpu", "--guidance", "1", "--out"]
    sfd_minimal.main([*base, str(tmp_path / "whole")])
    assert seen == 4 * [8]
    seen.clear()
    sfd_minimal.main([*base, str(tmp_path / "parts"), "--micro-batch", "3"])
    assert sorted(seen) == 8 * [2] + 16 * [3], "four evaluations, each once more for its gradient"


# -------------------------------------------------------------------------------------------------- devices, and a loss

def test_auto_takes_the_first_device_that_computes(monkeypatch, capsys):
    """A card without kernels for it raises when it is first used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    zeros = torch.zeros

    def no_kernel(*size, device=None, **how):
        if device is not None and torch.device(device).type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore lines")
        return zeros(*size, device=device, **how)
    monkeypatch.setattr(torch, "zeros", no_kernel)
    assert pick_device("auto") == CPU
    assert "no kernel image is available for execution on the device; the next device" in capsys.readouterr().out
    with pytest.raises(BadInput, match="no kernel image"):
        pick_device("cuda")


@pytest.mark.parametrize("cuda, says", [(None, "built without CUDA"), ("13.0", "driver may be older")])
def test_a_card_that_torch_cannot_use_is_mentioned(cuda, says, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert pick_device("auto") == CPU and says in capsys.readouterr().out


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory: you tried",
                                   "[enforce fail] DefaultCPUAllocator: not enough memory: you tried"])
def test_out_of_memory_in_the_words_of_each_system(words, capsys):
    def main(argv):
        raise RuntimeError(words + "\nmore")
    with pytest.raises(SystemExit) as stop:
        command(main)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.count("\n") == 1 and "smaller --batch" in err


def test_a_compiler_that_is_missing_is_one_line(capsys):
    """As torch raises it where --compile finds no C++ compiler."""
    class InductorError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def main(argv):
        raise InductorError("InvalidCxxCompiler: No working C++ compiler found in g++\n\nmore")
    with pytest.raises(SystemExit) as stop:
        command(main)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.count("\n") == 1 and "No working C++ compiler" in err
    assert "go on without --compile" in err


def test_the_resume_hint_is_in_the_quotes_of_the_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sfd.py", "--out", "my runs/it's", "--overwrite"])
    assert resume_command() == """python sfd.py --out 'my runs/it'"'"'s' --resume"""
    monkeypatch.setattr(os, "name", "nt")
    assert resume_command() == 'python sfd.py --out "my runs/it\'s" --resume'


def test_figures_leave_the_caller_s_backend_alone(tmp_path):
    before = matplotlib.get_backend()
    matplotlib.use("svg")
    try:
        samples_figure({"a": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)}, ["x", "y"], [0], tmp_path / "a.png")
        assert matplotlib.get_backend() == "svg" and (tmp_path / "a.png").stat().st_size > 1000
    finally:
        matplotlib.use(before)


# ------------------------------------------------------------------------------------------------ runs, and their twins

def settings(out, **more):
    return SimpleNamespace(**dict(out=str(out), steps=40, save_every=1e-9, resume=False, overwrite=False) | more)


@pytest.fixture
def comparable(monkeypatch):
    monkeypatch.setattr(lab.run, "comparable", lambda s: {})


def test_checkpoints_are_no_more_often_than_thirty_times_their_duration(comparable, tmp_path, monkeypatch):
    saves, save = [], Run.save
    monkeypatch.setattr(Run, "save", lambda self: (saves.append(self.step), time.sleep(0.02), save(self)))
    slow = Run(settings(tmp_path / "slow"), {})
    for _ in slow.steps({"loss": torch.tensor(time.sleep(0.01) or 1.0)} for _ in range(40)):
        pass
    assert saves[0] == 1 and saves[-1] == 40 and len(saves) <= 3, saves


def test_a_log_that_is_held_open_ends_no_run(comparable, tmp_path, monkeypatch, capsys):
    replace = os.replace

    def held(old, new):
        if str(new).endswith("log.csv"):
            raise PermissionError(13, "it is used by another process")
        replace(old, new)
    monkeypatch.setattr(os, "replace", held)
    one = Run(settings(tmp_path / "run"), {})
    for terms in one.steps({"loss": torch.tensor(1.0)} for _ in range(40)):
        one.log(terms)
    assert one.step == 40 and (tmp_path / "run" / "checkpoint.pt").exists()
    assert "log.csv could not be written now: it is used by another process" in capsys.readouterr().err


def test_a_twin_is_refused_while_the_first_lives(comparable, tmp_path):
    out = tmp_path / "run"
    first = Run(settings(out), {})
    (out / "checkpoint.pt").write_text("the first's")
    for more in (dict(overwrite=True), dict(resume=True)):
        with pytest.raises(BadInput, match="another run is writing to"):
            Run(settings(out, **more), {})
    assert (out / "checkpoint.pt").read_text() == "the first's"
    for _ in first.steps({"loss": torch.tensor(1.0)} for _ in range(40)):
        pass
    Run(settings(out, overwrite=True), {})


def test_a_kill_leaves_a_lock_harmless(tmp_path):
    code = f"from lab.run import lock; held = lock({str(tmp_path)!r}); print('held', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == "held\n"
    with pytest.raises(BadInput, match="another run is writing to"):
        lock(tmp_path)
    process.kill()
    process.communicate()
    lock(tmp_path).close()


def test_every_command_that_writes_a_run_respects_the_lock(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "PER_LABEL", 4)
    out = str(tmp_path / "run")
    sfd_minimal.main(["--teacher", str(tiny), "--to", "1", "--steps", "1", "--batch", "2", "--device", "cpu",
                      "--out", out])
    monkeypatch.setattr(audit, "real_images", lambda *args: {})
    with lock(out):
        for program in (evaluate, audit):
            with pytest.raises(BadInput, match="another run is writing to"):
                program.main([out, "--device", "cpu"])


def test_main_is_a_function_that_threads_may_call(tiny, tmp_path, monkeypatch):
    """And its handlers of signals are those of the main thread alone."""
    monkeypatch.setattr(evaluate, "PER_LABEL", 4)
    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=sfd_minimal.main, args=(
        ["--teacher", str(tiny), "--steps", "1", "--batch", "2", "--device", "cpu", "--out", str(tmp_path / "run")],))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "metrics.json").exists() and signal.getsignal(signal.SIGINT) is handler


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM")
def test_sigterm_saves_as_ctrl_c_does(tiny, tmp_path):
    save_network(load_checkpoint(tiny)[0], tmp_path / "teacher.pt", data="runes")
    process = subprocess.Popen([*program("sfd_minimal.py"), "--teacher", "teacher.pt", "--data", "runes", "--steps",
                                "5000", "--batch", "2", "--device", "cpu", "--out", "run"], cwd=tmp_path, text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not (tmp_path / "run").exists():
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in err, err
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] > 0
