"""The operator: keeps the Kubernetes objects of every HeteroRLRun as its manifest asks, and reports how far it is.

    kopf's watches ──▶ store, queue ──▶ reconcile ──▶ decide ──▶ desired objects ──▶ apply ──▶ observe ──▶ status

`handlers` only note what was seen and which run it concerns. `reconcile` looks at one run as a whole, whatever
happened to it: `life.decide` and `observe.status_of` are pure functions of what is known, everything else is I/O.
"""
