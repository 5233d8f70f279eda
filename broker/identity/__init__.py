"""Check the credentials of callers: API keys, tokens, and the keys that tokens are signed with."""
