"""Inference engines: generate groups of completions and score given tokens, behind one interface.

Owns everything that differs between vLLM and the plain transformers loop; nothing outside asks which engine it has.

Read first: `base` (the interface), `build` (the factory), then `vllm`.
"""
