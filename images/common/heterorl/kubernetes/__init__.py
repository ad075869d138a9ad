"""A run as Kubernetes objects: pure functions from manifest to dicts, without a client.

Owns names, labels, pods and workloads. The operator applies these objects, `heterorl render` prints the same ones.

Read first: `manifests` (all objects of a run), `pods` (the pod of a role, with the podTemplate merged in).
"""
