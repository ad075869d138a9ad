"""The learner: takes rollouts from the volume, optimizes the policy, publishes its weights.

    rollout_feed ──▶ train_step (advantages, micro-batches) ──▶ engines, losses ──▶ publish

Owns everything that needs gradients: advantages, losses, optimizer engines, checkpoints, and the model that a run
starts from. One process a rank; `launch` starts them and restarts them after a crash.

Read first: `train` (the loop), `train_step` (one step's arithmetic), `losses`, `rollout_feed`.
"""
