"""Results of a run, read from its folder: one HTML file, a picture, and the ledger of every rollout.

Owns nothing that a run needs: it only reads, works on unfinished and broken runs alike, and draws several runs over
each other. The HTML file stands on the modules of `ui/page`.

Read first: `page` (the report), `rows` (its tables), `figures` (the picture), `summary` (`summary.json`, the ledger).
"""
