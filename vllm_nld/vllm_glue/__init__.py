"""Every use of vLLM internals that are not extension points (ledger: ``docs/patches.md``)."""
