"""Every place that leans on vLLM internals that are not extension points (the ledger: ``docs/patches.md``)."""
