"""The first minutes on a GPU: ``scripts/gpu_check.sh`` runs this package; ``docs/gpu.md`` says what it measures."""
