"""Training engines: forward, backward, optimizer and weights over one or many ranks, behind one interface.

Owns everything that differs between plain PyTorch, DDP and DeepSpeed ZeRO; nothing outside asks which engine it has.

Read first: `base` (the interface), `build` (the factory), `torch_ddp` (the simplest engine).
"""
