"""`heterorl run`: learner and samplers as processes of this machine, one folder as the shared volume.

Owns the checks before the start, the processes with their restarts and their end, and the live view.

Read first: `run` (from manifest to report), `supervisor` (the loop), `processes` (one process and its restarts).
"""
