"""`heterorl ui`: runs in a browser, while they go on and afterwards.

Only reads run folders, and only what learner and samplers write anyway; holds nothing that a run needs. The page in
`page/` is plain ES modules without a build step and without an outside address.

Read first: `server` (the addresses), `library` (which runs there are), `run_view` (what is shown of one).
"""
