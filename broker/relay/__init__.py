"""One generation: the upstream in, viewers and journal out."""
