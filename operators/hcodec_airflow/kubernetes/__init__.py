"""Kubernetes as the backends use it: manifests, an asynchronous client, and why pods wait."""
