"""The operator: keeps the Kubernetes objects of every HeteroRLRun as its manifest asks, and reports how far it is.

    kopf's watches ──▶ cache, workqueue ──▶ reconcile ──▶ lifecycle ──▶ apply ──▶ conditions ──▶ status

`handlers` only note what was seen and which run it concerns. `reconcile` takes one run as a whole, whatever happened to
it: `lifecycle.decide` and `conditions.status_of` are pure functions of what is known, everything else is I/O.

Read first: `reconcile`, `lifecycle`, `conditions`; then `app`, which puts the parts together.
"""
