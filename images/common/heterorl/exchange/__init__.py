"""The shared volume through which one learner and many samplers work together.

Owns every path, name and file format on the volume, and the order of writes that makes a crash at any point harmless.
No other room builds a path below a run's folder: it asks `Exchange` for it.

Read first: `exchange` (the protocol, and what passes between learner and samplers), `rollout` (what a sampler
publishes), `weights` (how a reader comes to a version), `records` (every JSON file), `storage` (the durable file
operations). `Exchange` is built on `LearnerState` (what the learner keeps for itself, its right to write), and that on
`RunFolder` (places, manifest, whose folder it is).
"""

PROTOCOL = 1
"""Of every file that learner and samplers exchange."""
