"""The model: bidirectional backbone on flat batches, pooling, and ``NVEmbed`` around both."""
