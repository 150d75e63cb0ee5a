"""Training scripts on the HF Trainer: each reads top to bottom and runs as `python -m trainers.NAME`."""
