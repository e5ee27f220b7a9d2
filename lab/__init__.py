"""Support code of sfd_minimal.py. lab/README.md says what is where."""
