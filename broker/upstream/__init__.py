"""The upstream service: the client, and its errors turned into ours."""
