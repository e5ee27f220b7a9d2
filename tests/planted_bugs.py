"""Lines of the method, each broken in a way that a reader may not see. tests/test_method.py must notice every one."""
import types

from conftest import ROOT

BUGS = {  # name: (file, the line as it is, the line with a bug)
    "teacher and fake swapped": (
        "sfd_minimal.py", "S = score_identity_loss(teacher, fake,", "S = score_identity_loss(fake, teacher,"),
    "D_phi and D_psi swapped": ("sfd_minimal.py", "S = (D_phi - D_psi)", "S = (D_psi - D_phi)"),
    "c_f in the teacher's label": (
        "sfd_minimal.py", "x_g, c_phi, c_psi, sigma, s.alpha)", "x_g, c_psi, c_psi, sigma, s.alpha)"),
    "omega not detached": ("sfd_minimal.py", "(D_phi - x_g).detach().abs()", "(D_phi - x_g).abs()"),
    "omega not floored": ("sfd_minimal.py", ".mean(1).clamp(min=1e-5)", ".mean(1)"),
    "omega summed": ("sfd_minimal.py", ".abs().flatten(1).mean(1)", ".abs().flatten(1).sum(1)"),
    "sign of alpha flipped": ("sfd_minimal.py", "- alpha * (D_phi - D_psi)", "+ alpha * (D_phi - D_psi)"),
    "psi fed the override label": (
        "sfd_minimal.py", "x_g, c_phi, c_psi, sigma, s.alpha)", "x_g, c_phi, c_phi, sigma, s.alpha)"),
    "psi trained on the override label": ("sfd_minimal.py", "x_g.detach(), c_psi, sigma", "x_g.detach(), c_phi, sigma"),
    "x_g not detached in the psi step": (
        "sfd_minimal.py", "fake_score_loss(fake, x_g.detach(),", "fake_score_loss(fake, x_g,"),
    "weight of L_psi inverted": ("sfd_minimal.py", "/ (sigma * sigma_data) ** 2", "* (sigma * sigma_data) ** 2"),
    "gradient left in psi and phi": (
        "sfd_minimal.py", "L_theta.backward(inputs=[p for p in generator.parameters() if p.requires_grad])",
        "L_theta.backward()"),
    "frozen weights trained": (
        "sfd_minimal.py", "inputs=[p for p in generator.parameters() if p.requires_grad]",
        "inputs=[p for p in generator.parameters()]"),
    "theta's last gradient kept": ("sfd_minimal.py", "    optimizer_theta.zero_grad()\n", ""),
    "psi's last gradient kept": ("sfd_minimal.py", "    optimizer_psi.zero_grad()\n", ""),
    "psi never steps": ("sfd_minimal.py", "    optimizer_psi.step()\n", ""),
    "forgetting weight ignored": ("sfd_minimal.py", "L_keep + s.lambda_forget * L_forget", "L_keep + L_forget"),
    "kept and forgotten swapped": (
        "sfd_minimal.py", "L_keep = torch.where(forgotten, 0, S)", "L_keep = torch.where(forgotten, S, 0)"),
    "forgotten rows in both terms": (
        "sfd_minimal.py", "L_keep = torch.where(forgotten, 0, S).sum()", "L_keep = S.sum()"),
    "a mask of integers taken": ("sfd_minimal.py", "forgotten.dtype != torch.bool or ", ""),
    "a mask of another shape taken": ("sfd_minimal.py", " or forgotten.shape != (B,)", ""),
    "extra loss ignored": ("sfd_minimal.py", "L_theta = L_theta + extra_loss(", "extra_loss("),
    "extra loss without gradient": (
        "sfd_minimal.py", "extra_loss(x_g, z, c_psi, forgotten)\n", "extra_loss(x_g.detach(), z, c_psi, forgotten)\n"),
    "extra loss under the override label": (
        "sfd_minimal.py", "extra_loss(x_g, z, c_psi, forgotten)\n", "extra_loss(x_g, z, c_phi, forgotten)\n"),
    "generator evaluated at another noise level": ("sfd_minimal.py", "generator(sigma_init * z,", "generator(z,"),
    "generated under the override label": (
        "sfd_minimal.py", "(sigma_init * z, sigma_init, c_psi)", "(sigma_init * z, sigma_init, c_phi)"),
    "u_max ignored": ("sfd_minimal.py", "u = s.u_max * torch.rand(", "u = torch.rand("),
    "another rho": ("sfd_minimal.py", "(low + u * (high - low)).pow(7)", "(low + u * (high - low)).pow(5)"),
    "the upper part of the grid": (
        "sfd_minimal.py", "(low + u * (high - low)).pow(7)", "(high + u * (low - high)).pow(7)"),
    "p_std ignored": ("sfd_minimal.py", "s.p_mean + s.p_std * torch.randn(", "s.p_mean + torch.randn("),
    "override ignored": ("sfd_minimal.py", "conditions[c_o], conditions[c],", "conditions[c], conditions[c],"),
    "a random label that may be forgotten": (
        "sfd_minimal.py", "kept = labels[override == labels]", "kept = labels"),
    "one random label for the batch": (
        "sfd_minimal.py", "kept[torch.randint(len(kept), (batch,),", "kept[torch.randint(len(kept), (1,),"),
    "the caller's teacher frozen": (
        "sfd_minimal.py", "frozen_teacher = copy.deepcopy(teacher)", "frozen_teacher = teacher"),
    "the teacher left in training mode": (
        "sfd_minimal.py", "copy.deepcopy(teacher).eval().requires_grad_", "copy.deepcopy(teacher).requires_grad_"),
    "the generator left in training mode": (
        "sfd_minimal.py", "teacher if generator is None else generator).eval()",
        "teacher if generator is None else generator)"),
    "the average keeps gradients": (
        "sfd_minimal.py", "copy.deepcopy(generator).requires_grad_(False)", "copy.deepcopy(generator)"),
    "frozen parameters set free": (
        "sfd_minimal.py", "parameter.requires_grad_(learn)", "parameter.requires_grad_(True)"),
    "rate of the first group alone": (
        "sfd_minimal.py", "for group in optimizer.param_groups:", "for group in optimizer.param_groups[:1]:"),
    "no constant half": ("sfd_minimal.py", "min(1.0, 2 * (1 - step / s.steps))", "1 - step / s.steps"),
    "average of the last step": ("sfd_minimal.py", "a.lerp_(p, 1 - beta)", "a.lerp_(p, beta)"),
    "average without buffers": ("sfd_minimal.py", "        a.copy_(p)\n", "        pass\n"),
    "one condition for both networks": (
        "sfd_minimal.py", "z, c_phi, c_psi, forgotten, s, n.teacher.sigma_data)",
        "z, c_psi, c_psi, forgotten, s, n.teacher.sigma_data)"),
    "anchor on the forgotten labels": (
        "lab/distill.py", "torch.where(forgotten, 0, squared)", "torch.where(forgotten, squared, 0)"),
    "anchor without its weight": ("lab/distill.py", "s.lambda_anchor * anchor_loss(", "anchor_loss("),
    "anchor at another noise level": (
        "lab/distill.py", "draw(anchor, z, c, sigma_init)", "draw(anchor, z / 2, c, sigma_init)"),
    "guidance of the kept labels": (
        "lab/distill.py", "rows = forgotten.nonzero()[:, 0]", "rows = (~forgotten).nonzero()[:, 0]"),
    "guidance towards the forgotten label": (
        "lab/distill.py", "D_f + guidance * (D_phi[rows] - D_f)", "D_phi[rows] + guidance * (D_f - D_phi[rows])"),
    "guidance counted twice": ("lab/distill.py", "D_f + guidance *", "D_phi[rows] + guidance *"),
    "guidance from the override itself": (
        "lab/distill.py", "map_condition(with_rows, c_phi, c_psi)", "map_condition(with_rows, c_phi, c_phi)"),
    "share of the wrong labels": ("lab/distill.py", "torch.where(to_forget, share", "torch.where(~to_forget, share"),
}


def module_with_bug(name):
    """The file of a bug as a module, with the bug in it."""
    file, line, broken = BUGS[name]
    source = (ROOT / file).read_text()
    assert source.count(line) == 1, f"the line to break is not there once: {line}"
    module = types.ModuleType("a module with a bug")
    module.__file__ = str(ROOT / file)
    exec(compile(source.replace(line, broken), file, "exec"), module.__dict__)
    return module
