"""What a run tells about itself: metrics, probes, and how far it is.

Owns the metrics files and their sinks (JSON lines, Prometheus, TensorBoard, Weights & Biases), the HTTP pages of every
process, and the two readers of progress: `progress` for the terminal, `run_metrics` for the operator.

Read first: `metrics`, then `progress`.
"""
