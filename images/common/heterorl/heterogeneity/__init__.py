"""What makes samplers unequal: how late new weights reach them, and when they exist.

Owns the distributions of delays, the policy that decides which published version a sampler adopts, and the number of
replicas at any moment of a run. Everything here is a pure function of seed, slot and time, so it repeats exactly.

Read first: `delay`, then `availability`.
"""
