"""The first minutes on a GPU: ``scripts/gpu_check.sh`` runs it; ``docs/developer/gpu.md`` says what it measures."""
