"""The manifest: every field declared once, and all that follows from the declaration.

Owns the fields of a `HeteroRLRun`, the rules across fields, the messages about a wrong manifest, which fields may
change during a run, and the generated CRD and reference. No other room reads YAML manifests or states a default.

Read first: `run` (the fields), `load` (from file to checked manifest), `mutability` (what may change, and when).
"""
