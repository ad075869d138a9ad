"""Results of a run, read from its folder: curves, figures, one HTML page, and the ledger of every rollout.

Owns nothing that a run needs: it only reads, works on unfinished and broken runs alike, and draws several runs over
each other.

Read first: `page` (the report), `series` (records as curves), `summary` (`summary.json` and its ledger).
"""
