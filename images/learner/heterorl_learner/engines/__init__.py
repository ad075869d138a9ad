"""Training engines: forward, backward, optimizer and weights over one or many ranks, behind one interface.

Owns everything that differs between plain PyTorch, DDP and DeepSpeed ZeRO; nothing outside asks which engine it has.

Read first: `torch_ddp` (the interface and the plain engine), then `build` (the factory).
"""
