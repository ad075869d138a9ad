"""The sampler: generates completions with the weights it holds, scores them, and publishes them as rollouts.

    weight_sync ──▶ engines ──▶ scoring ──▶ the volume

Owns generation, rewards, the moment at which new weights are swapped in, and evaluation, which uses the same engines.

Read first: `sample` (the loop), `weight_sync` (which version is served), `scoring`, `rewards`.
"""
