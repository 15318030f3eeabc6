"""Everything that touches the device: the model, the KV cache's memory, sampling."""
