"""What a run tells about itself: metrics, probes, and how far it is.

Owns the metrics files and their sinks (JSON lines, Prometheus, TensorBoard, Weights & Biases), the HTTP pages of every
process, and how far the run is: `snapshot` reads it, `progress` tells the terminal, `run_metrics` the operator.

Read first: `metrics`, then `snapshot`.
"""
