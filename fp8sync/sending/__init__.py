"""The ways out of a trainer rank: buckets, turns of buckets, whole tensors, or straight into staging memory."""
