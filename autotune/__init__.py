"""The autotuner: explicit, offline, per device. `fastattn tune` is its command line."""
