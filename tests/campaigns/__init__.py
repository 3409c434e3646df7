"""Trials by the thousand of what must never happen: a bug's status, a traceback, a hang, a changed byte.

``fuzz`` damages checkpoints, recipes and run folders. Each campaign is seeded, resumes, and notes its counts in
``docs/reliability.json`` through ``ledger``. ``command`` runs the command line in this process, ``workers`` gives cases to
processes that may die. `make soak` runs the long ones.
"""
