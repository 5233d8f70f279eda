"""The model side: the client, its retries, and its errors turned into ours."""
