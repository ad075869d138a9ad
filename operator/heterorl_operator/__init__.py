"""The operator: keeps the Kubernetes objects of every HeteroRLRun as its manifest asks, and reports how far it is.

    kopf's watches ──▶ cache, workqueue ──▶ reconcile ──▶ lifecycle ──▶ apply ──▶ conditions ──▶ status

`handlers` only update the cache and queue the run that an event concerns. `reconcile` takes one run as a whole,
whatever happened to it: `lifecycle.decide` and `status.status_of` are pure functions of a `context.RunContext`;
everything else is I/O.

Read first: `reconcile`, `lifecycle`, `conditions`; then `app`, which puts the parts together.
"""
