"""Branches: blocks that a verify forward drafts in case verification ends at one place."""
