"""HeteroRL: reinforcement learning for language models on machines that are far apart, unequal, or come and go."""
