"""HeteroRL: reinforcement learning for language models on machines that are far apart, unequal, or come and go.

This package holds what learner, samplers, operator and command line agree on; it imports none of them, and neither
torch nor kopf. Its rooms, from the ground up, each importing only what stands above it in this list:

    spec            the manifest: its fields, checks and defaults, and the CRD and reference generated from it
    data            datasets, prompts and answer checks
    heterogeneity   when a sampler gets new weights, and when it exists at all
    kubernetes      a run as Kubernetes objects
    exchange        the shared volume: weights, rollouts, journal, checkpoints
    monitoring      metrics, probes, and how far a run is
    report          figures and summary of finished runs
    local           `heterorl run`: a whole run on one machine

Read first: `spec/run.py` (what can be configured), then `exchange/exchange.py` (the protocol everything rests on).
"""
