"""Inference engines: generate groups of completions and score given tokens, behind one interface.

Owns everything that differs between vLLM and the plain transformers loop; nothing outside asks which engine it has.

Read first: `build` (the interface and the factory), then `vllm`.
"""
