"""Attention of draft passes: vLLM's backend taught to recognise them, and the operators that compute them."""
