"""X-Codec (arXiv 2408.17175): acoustic and SSL features in one residual quantiser."""
