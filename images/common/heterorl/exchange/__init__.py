"""The shared volume through which one learner and many samplers work together.

Owns every path, name and file format on the volume, and the order of writes that makes a crash at any point harmless.
No other room builds a path below a run's folder: it asks `Exchange` for it.

Read first: `exchange` (the protocol), `rollout` (what a sampler publishes), `storage` (the durable file operations).
"""
