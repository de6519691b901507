"""Every use of vLLM internals that are not extension points (ledger: ``docs/developer/patches.md``)."""
