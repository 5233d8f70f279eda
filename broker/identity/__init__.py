"""Whether what a caller shows is good: API keys, tokens, and the keys that tokens are signed with."""
