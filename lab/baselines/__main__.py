"""Compare ways to make a diffusion model forget a class with SFD: one teacher, two judges, one protocol.

    python -m lab.baselines --forget 0 --to 1                            # all methods; --resume goes on with the rest
    python -m lab.baselines --forget 0 --to 1 --method esd label_swap    # some of them
"""
from edm_unet import command, command_line
from lab.baselines.compare import Comparison, Settings, compare
from lab.core.options import parse


def main(argv):
    s = parse(Settings, argv, __doc__)
    compare(Comparison(s))
    audit = command_line("-m", "lab.audit", s.out)
    print(f"next: {audit}    # attacks that try to bring the label back; needs real images")


if __name__ == "__main__":
    command(main)
