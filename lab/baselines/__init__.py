"""Other unlearning methods, compared with SFD: `python -m lab.baselines --forget 0 --to 1`."""
