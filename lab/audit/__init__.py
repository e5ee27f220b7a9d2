"""Attacks that try to bring a forgotten class back: `python -m lab.audit RUN`."""
